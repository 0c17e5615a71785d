"""A worker's place among several, and what it tells its parent: the little that the two must agree on."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

BEAT_S = 1.0
_BEAT = b"."
_REFUSAL = b"!"


@dataclass(frozen=True)
class Place:
    """What the parent gives a worker, as one argument of its command line. The numbers of files stay what they are."""

    number: int  # 0 .. workers - 1; whoever replaces a worker has its number
    workers: int
    replaces: bool  # an earlier process of this number has ended
    listeners: list[int]  # sockets, bound
    lifeline: int  # a pipe to read from: it ends when the parent does
    metrics_folder: str
    reports: int = -1  # a pipe to write to

    def to_argument(self) -> str:
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def from_argument(cls, text: str) -> "Place":
        return cls(**orjson.loads(text))

    @property
    def files(self) -> list[int]:
        """The open files that the worker inherits."""
        return [*self.listeners, self.lifeline, self.reports]

    @property
    def folder(self) -> Path:
        return Path(self.metrics_folder)

    def beat(self) -> None:
        """Tell the parent that this worker serves and its event loop turns."""
        self._report(_BEAT)

    def refuse(self, message: str) -> None:
        """Tell the parent that this worker cannot start, and why."""
        self._report(_REFUSAL + message.encode())

    def _report(self, line: bytes) -> None:
        # Never waits: with a parent that reads no more the pipe fills up, and only a parent that is gone closes it.
        os.set_blocking(self.reports, False)
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.reports, line + b"\n")


class Reports:
    """The parent's end of one worker's reports."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._rest = b""
        os.set_blocking(file, False)

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)

    def read(self) -> tuple[bool, str | None]:
        """(whether it has beaten, why it cannot start) since the last call. Never waits."""
        data = self._rest
        with suppress(BlockingIOError):
            while received := os.read(self._file, 65536):
                data += received
        *lines, self._rest = data.split(b"\n")
        refusals = [line[1:].decode() for line in lines if line.startswith(_REFUSAL)]
        return _BEAT in lines, refusals[0] if refusals else None
