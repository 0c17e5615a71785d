"""Pipelined writes of records: many SETs per round trip, bounded in bytes, and in bytes a second if asked."""

import time
from array import array

from cache_builder.ledger import digest
from cache_builder.store import Store
from model.cache_format import Published, record_key
from model.identifiers import Id

PIPELINE_BYTES = 4 << 20  # more gains nothing: at 10 kB a record, that is 400 users per round trip
# Under a limit the round trips are small and even: the server answers no reader while it takes one in.
PACED_PIPELINES_PER_S = 20
SMALLEST_PIPELINE_BYTES = 64 << 10


class Writer:
    """Writes records of one generation and keeps count of what it wrote."""

    def __init__(self, store: Store, prefix: str, published: Published, max_bytes_per_s: float | None = None) -> None:
        """max_bytes_per_s: of records, on average since the first write; None: as fast as the store takes them."""
        self._store, self._prefix, self._published = store, prefix, published
        self._rate = max_bytes_per_s
        paced = PIPELINE_BYTES if max_bytes_per_s is None else int(max_bytes_per_s / PACED_PIPELINES_PER_S)
        self._pipeline_bytes = min(PIPELINE_BYTES, max(SMALLEST_PIPELINE_BYTES, paced))
        self._next_write = 0.0  # time.monotonic() before which nothing may be written
        self._pending: list[tuple[str, bytes]] = []
        self._pending_bytes = 0
        self._told = 0  # records that `news` has spoken of
        self.user_ids: list[Id] = []  # in the order of their records
        self.sizes: array[int] = array("Q")
        self.digests: array[int] = array("Q")

    def put(self, user_id: Id, data: bytes) -> None:
        """Write one record, now or with the next ones. Raises ValueError for an id that has no key, or StoreError."""
        key = record_key(self._prefix, self._published.model_id, self._published.generation, user_id)
        self._pending.append((key, data))
        self._pending_bytes += len(data)
        self.user_ids.append(user_id)
        self.sizes.append(len(data))
        self.digests.append(digest(data))
        if self._pending_bytes >= self._pipeline_bytes:
            self.flush()

    def news(self) -> tuple[int, int]:
        """Records and bytes since this was asked last."""
        known, self._told = self._told, len(self.sizes)
        return self._told - known, sum(self.sizes[known:])

    def flush(self) -> None:
        """Write what is pending. Raises StoreError."""
        if self._pending:
            self._wait()
            self._store.set_many(self._pending)
        self._pending, self._pending_bytes = [], 0

    def _wait(self) -> None:
        if self._rate is None:
            return
        now = time.monotonic()
        time.sleep(max(0.0, self._next_write - now))
        # A store that was slow for a while is not made to catch up: that would be the burst that the limit is against.
        self._next_write = max(self._next_write, now) + self._pending_bytes / self._rate
