"""HTTP by hand, over a socket: for requests that no client sends."""

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

WAIT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """One answer, as it came."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawConnection:
    """A connection to the service of `client`, or to a port."""

    def __init__(self, service: httpx.Client | int, *, receive_bytes: int | None = None) -> None:
        """receive_bytes: of the kernel's buffer, for a caller that takes little."""
        port = service if isinstance(service, int) else service.base_url.port
        self._socket = socket.socket()
        self._socket.settimeout(WAIT_S)
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.connect(("127.0.0.1", port))
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._socket.close()

    def fileno(self) -> int:
        """For select: readable when an answer has begun to come."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def end(self) -> None:
        """Nothing more is sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def answer(self) -> Answer | None:
        """The next answer with its body; None if the service has closed the connection."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        version, status, *_ = line.decode().split(" ")
        assert version == "HTTP/1.1", line
        headers = {}
        while (line := self._file.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        length = int(headers.get("content-length", 0))
        body = self._file.read(length)
        assert len(body) == length, f"{status}: {len(body)} bytes of {length}"
        return Answer(int(status), headers, body)

    def answers(self) -> list[Answer]:
        """All until the service closes the connection."""
        found = []
        while (answer := self.answer()) is not None:
            found.append(answer)
        return found

    def rest(self) -> bytes:
        """Whatever comes until the service ends the connection."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""
