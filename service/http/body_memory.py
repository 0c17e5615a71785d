"""Memory for bodies that are being received, or wait to be read: bounded over all callers, not only for each.

A thousand callers who each send 8 MB, as fast or as slowly as they like, would otherwise have 8 GB of it. What nearly
every body fits into counts for nothing: else a few who send slowly would have everybody refused, and connections are
bounded anyway.
"""

from types import TracebackType

from service.errors import Overloaded

FREE_BYTES = 65_536  # of each body


class BodyMemory:
    """What all bodies together hold."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0

    def of_one(self) -> "HeldBody":
        """To be used in a with-block that ends when the body is read."""
        return HeldBody(self)


class HeldBody:
    """What one body holds of it."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._free_bytes = FREE_BYTES
        self._bytes = 0

    def add(self, size: int) -> None:
        """So much more has come. Raises Overloaded if that is more than there is."""
        if size <= self._free_bytes:
            self._free_bytes -= size
            return
        size, self._free_bytes = size - self._free_bytes, 0
        memory = self._memory
        if memory.held_bytes + size > memory.most_bytes:
            found = f"bodies that are being read hold {memory.held_bytes >> 20} of {memory.most_bytes >> 20} MiB"
            raise Overloaded(f"{found}: ask another replica, or this one again after Retry-After", retry_after_s=1)
        memory.held_bytes += size
        self._bytes += size

    def __enter__(self) -> "HeldBody":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.held_bytes -= self._bytes
