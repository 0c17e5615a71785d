"""A connection on which one question is under way at a time, without asyncio's streams.

Bytes that nobody asked for belong to another question: whoever took them for his reply would get another user's record.
So a line that receives any while no question is under way, or more than one reply to a question, is closed, as is one
whose question was given up.
"""

import asyncio
from typing import Any

import hiredis

NOT_YET = object()  # what the reader gives while a reply is incomplete
_TICK_S = 0.001  # of uvloop's clock: an alarm for less would ring at once, again and again


class Line(asyncio.Protocol):
    """Takes over a transport on which nothing is under way."""

    def __init__(self, transport: asyncio.Transport, reader: hiredis.Reader) -> None:
        """reader: of replies, which gives NOT_YET where there is none."""
        self.is_open = not transport.is_closing()  # and fit for a question
        self._transport = transport
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._reply: asyncio.Future[Any] | None = None
        self._deadline = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    async def ask(self, question: bytes, deadline: float) -> Any:
        """The reply, which may be an error that the store sent.

        question: packed. deadline: by the loop's clock, and no earlier than that of the question before.
        Raises TimeoutError, ConnectionError for a connection that broke, and what the reader raises of bytes that are
        no reply. The line is closed then, and when this is cancelled.
        """
        if not self.is_open:
            raise ConnectionResetError("the connection to the store is closed")
        assert self._reply is None, "one question at a time"
        reply = self._reply = self._loop.create_future()
        self._set_alarm(deadline)
        try:
            self._transport.write(question)
            return await reply
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """At once, whatever is still to be sent or received."""
        self.is_open = False
        self._transport.abort()
        if self._alarm is not None:
            self._alarm.cancel()

    # ---- the deadline

    def _set_alarm(self, deadline: float) -> None:
        """One alarm outlasts many questions: one for each took 3 µs of CPU, of 22 for a read of one record."""
        self._deadline = deadline
        if self._alarm is None:
            self._alarm = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._reply is None:
            return
        if self._deadline - self._loop.time() > _TICK_S:
            self._set_alarm(self._deadline)
        else:
            self._lose(TimeoutError())

    # ---- what the transport calls

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            reply = self._reader.gets()
        except Exception as error:
            self._lose(error)
            return
        if self._reply is None:
            self.close()
        elif reply is not NOT_YET:
            self._answer(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """Also after an end of file: then there is no error."""
        self._lose(ConnectionResetError(str(error or "the store closed the connection")))

    def _answer(self, reply: Any) -> None:
        asked, self._reply = self._reply, None
        if self._reader.has_data():
            self.close()
        if asked is not None and not asked.done():
            asked.set_result(reply)

    def _lose(self, error: Exception) -> None:
        self.close()
        asked, self._reply = self._reply, None
        if asked is not None and not asked.done():
            asked.set_exception(error)
