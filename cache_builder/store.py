"""The only file that talks to Redis: bytes under keys, a few scripts, and every error of redis-py as a StoreError.

It knows neither records nor generations. It speaks to one server (Redis >= 6.2 or Valkey), by URL; a sharded cluster
needs a client that groups keys by node, and is refused by the server with MOVED, which surfaces as a StoreError.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from cache_builder.errors import StoreError

# By base class; tests/cache_builder/test_store.py fails when redis-py has an error that none of these covers.
THIRD_PARTY_ERRORS: tuple[type[Exception], ...] = (
    redis_errors.RedisError,
    redis_errors.RedisClusterException,
    redis_errors.ChildDeadlockedError,
    redis_errors.IncorrectPolicyType,
    OSError,
)

# All attempts of one call together stay below the lock's 60 s, so that a store that hangs for one call costs no lock.
CONNECT_TIMEOUT_S = 5.0
SOCKET_TIMEOUT_S = 10.0
RETRIES = 2  # every write here may be repeated: a SET is idempotent and the scripts recognise their own success
SCAN_COUNT = 1_000  # keys looked at per call: at 5,000 the server answered nobody for 2 ms


class Memory(NamedTuple):
    """What a server says of its memory, in bytes."""

    used: int
    limit: int  # 0: none
    policy: str  # what it does when full


class Store:
    """One store, open. Every method raises StoreError."""

    def __init__(self, url: str, timeout_s: float = SOCKET_TIMEOUT_S) -> None:
        """url: redis://, rediss:// or unix://; timeout_s: of one answer. Connects on first use.

        Raises StoreError on another URL.
        """
        self.name = redacted(url)
        try:
            # RESP2: with RESP3 redis-py 8 skips its check for unread data on a pooled connection, and a connection
            # that is one reply behind hands out the answer to another question.
            self._redis: Any = redis.Redis.from_url(
                url,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                retry=Retry(ExponentialBackoff(cap=2, base=0.1), RETRIES),
            )
        except ValueError as error:
            wanted = "redis://host:port, rediss://host:port, unix:///path or embedded:FOLDER"
            raise StoreError(f"store {self.name} is not a URL that can be opened: wanted {wanted}") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redis.close()

    def ping(self) -> None:
        """Raise StoreError unless the store answers."""
        with self._translated("answer"):
            self._redis.ping()

    def get(self, key: str) -> bytes | None:
        """The value, None where there is none."""
        with self._translated("read"):
            value: bytes | None = self._redis.get(key)
            return value

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values in the order of the keys, in one round trip."""
        if not keys:
            return []
        with self._translated("read"):
            values: list[bytes | None] = self._redis.mget(keys)
            return values

    def set_many(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Write all, in one round trip. After a StoreError any of them may have been written."""
        pipeline = self._redis.pipeline(transaction=False)
        for key, value in values:
            pipeline.set(key, value)
        with self._translated("write"):
            # raise_on_error would put the command, a user's record, into the message.
            answers = pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete keys, whether or not they are there."""
        with self._translated("delete"):
            self._redis.unlink(*keys)

    def scan(self, key_prefix: str, size: int) -> Iterator[list[bytes]]:
        """Every key that begins with `key_prefix`, some perhaps twice, at most `size` at a time.

        Walks the whole key space; keys that are written or deleted meanwhile may or may not be found.
        """
        pattern = "".join(f"\\{character}" if character in "*?[]\\^" else character for character in key_prefix) + "*"
        cursor = None
        while cursor != 0:
            with self._translated("read"):
                cursor, keys = self._redis.scan(cursor or 0, match=pattern, count=SCAN_COUNT)
            yield from (keys[start : start + size] for start in range(0, len(keys), size))

    def run(self, script: str, keys: Sequence[str | bytes], arguments: Sequence[str | bytes | int]) -> Any:
        """The answer of a Lua script. It may run twice if the connection breaks: it must be written for that."""
        with self._translated("run a script"):
            return self._redis.eval(script, len(keys), *keys, *arguments)

    def members(self, key: str) -> set[bytes]:
        """The members of a set, none where it does not exist."""
        with self._translated("read"):
            return set(self._redis.smembers(key))

    def remove_member(self, key: str, name: str) -> None:
        """Take one member out of a set."""
        with self._translated("write"):
            self._redis.srem(key, name)

    def memory(self) -> Memory:
        """The server's memory."""
        with self._translated("say how much memory it uses"):
            found = self._redis.info("memory")
        return Memory(found["used_memory"], found.get("maxmemory", 0), found.get("maxmemory_policy", "unknown"))

    def memory_of(self, keys: Sequence[str]) -> list[int]:
        """Bytes that the server needs for each key and its value, its own bookkeeping included; 0 for a missing key."""
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.memory_usage(key, samples=0)
        with self._translated("say how much memory a record takes"):
            return [size or 0 for size in pipeline.execute()]

    def save(self) -> None:
        """Write everything to the server's disk before returning."""
        with self._translated("save"):
            self._redis.save()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis_errors.OutOfMemoryError as error:
            raise StoreError(
                f"store {self.name} is full, it has reached its maxmemory: raise that or free memory, then build again"
            ) from error
        except THIRD_PARTY_ERRORS as error:
            raise StoreError(f"store {self.name} did not {what}: {type(error).__name__}: {error}") from error


def redacted(url: str) -> str:
    """`url` without what a log must not hold: user name, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(unreadable URL)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else "(URL without a scheme)"
