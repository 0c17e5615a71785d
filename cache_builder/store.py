"""The only file that talks to Redis: bytes under keys, a few scripts, and every error of redis-py as a StoreError.

It knows neither records nor generations. It speaks to one server (Redis >= 6.2 or Valkey) or to a cluster of them, by
URL (connection.py). On a cluster a question about many keys goes to each node in one round trip, a question about the
whole store to every primary; a script's keys must share a hash tag.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from cache_builder.connection import Connection, redacted, server_url
from cache_builder.errors import StoreError, StoreFullError

# By base class; tests/cache_builder/test_store.py fails when redis-py has an error that none of these covers.
THIRD_PARTY_ERRORS: tuple[type[Exception], ...] = (
    redis_errors.RedisError,
    redis_errors.RedisClusterException,
    redis_errors.ChildDeadlockedError,
    redis_errors.IncorrectPolicyType,
    OSError,
)
NOT_REACHED = (redis_errors.ConnectionError, redis_errors.TimeoutError)
SLOT_MOVES = (redis_errors.AskError, redis_errors.TryAgainError)  # MOVED is an AskError too

# All attempts of one call together stay below the lock's 60 s, so that a store that hangs for one call costs no lock.
CONNECT_TIMEOUT_S = 5.0
SOCKET_TIMEOUT_S = 10.0
RETRIES = 2  # every write here may be repeated: a SET is idempotent and the scripts recognise their own success
CLUSTER_RETRIES = 1  # before it, another node is asked who has which slots, which may take as long again
SCAN_COUNT = 1_000  # keys looked at per call: at 5,000 the server answered nobody for 2 ms

Command = tuple[Any, ...]  # its name, one key, the rest


class Memory(NamedTuple):
    """What a server says of its memory, in bytes."""

    used: int
    limit: int  # 0: none
    policy: str  # what it does when full


@dataclass(frozen=True, repr=False)
class Address:
    """What a store is opened by, for another process to open it too. It has the password, if there is one."""

    url: str
    timeout_s: float
    connection: Connection | None


class Store:
    """One store, open. Every method raises StoreError."""

    def __init__(self, url: str, timeout_s: float = SOCKET_TIMEOUT_S, connection: Connection | None = None) -> None:
        """url: as in connection.py; timeout_s: of one answer; connection: what the URL does not say.

        A server is connected to on first use; a cluster is asked at once which nodes it has.
        Raises StoreError on another URL, for a file that cannot be read, or if no cluster answers.
        """
        self.name = redacted(url)
        self.address = Address(url, timeout_s, connection)
        plain_url, self._clustered = server_url(url)
        # RESP2: with RESP3 redis-py 8 skips its check for unread data on a pooled connection, and a connection
        # that is one reply behind hands out the answer to another question.
        options = {
            "protocol": 2,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            **(connection or Connection()).arguments(url),
        }
        kind, retries = (RedisCluster, CLUSTER_RETRIES) if self._clustered else (redis.Redis, RETRIES)
        retry = Retry(ExponentialBackoff(cap=2, base=0.1), retries)
        with self._translated("open"):
            try:
                self._redis: Any = kind.from_url(plain_url, retry=retry, **options)
            except ValueError:  # it would show the URL, hence not chained
                raise StoreError(f"store {self.name} has a query that redis-py does not understand") from None

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._clustered:
            self._redis.disconnect_connection_pools()  # close() of redis-py's cluster client leaves them open
        self._redis.close()

    @classmethod
    def at(cls, address: Address) -> "Store":
        """The same store from another process."""
        return cls(address.url, address.timeout_s, address.connection)

    def ping(self) -> None:
        """Raise StoreError unless the store answers: of a cluster, every primary."""
        self._of_each_server("answer", lambda server: server.ping())

    def get(self, key: str) -> bytes | None:
        """The value, None where there is none."""
        with self._translated("read"):
            value: bytes | None = self._redis.get(key)
            return value

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values in the order of the keys, in one round trip to each server."""
        return self._each("read", [("GET", key) for key in keys])

    def set_many(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Write all, in one round trip to each server. After a StoreError any of them may have been written."""
        self._each("write", [("SET", key, value) for key, value in values])

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete keys, whether or not they are there; the number of those that were."""
        return sum(self._each("delete", [("UNLINK", key) for key in keys]))

    def expire(self, keys: Sequence[bytes], ttl_s: int) -> int:
        """Let keys be deleted after that time; the number of those that are there."""
        return sum(self._each("set an expiry", [("EXPIRE", key, ttl_s) for key in keys]))

    def ttl(self, key: bytes) -> int | None:
        """Seconds until a key is deleted; -1 if it has no expiry, None if it is not there."""
        with self._translated("read"):
            seconds: int = self._redis.ttl(key)
            return None if seconds == -2 else seconds

    def size(self) -> int:
        """How many keys there are, of all prefixes."""
        return sum(count for count, _ in self._of_each_server("count its keys", lambda server: server.dbsize()))

    def scan(self, key_prefix: str, size: int) -> Iterator[list[bytes]]:
        """Every key that begins with `key_prefix`, some perhaps twice, at most `size` at a time.

        Walks the whole key space; keys that are written or deleted meanwhile may or may not be found, and on a cluster
        those of a slot that is moved to another node meanwhile.
        """
        pattern = "".join(f"\\{character}" if character in "*?[]\\^" else character for character in key_prefix) + "*"
        for server, _ in self._parts():
            cursor = None
            while cursor != 0:
                with self._translated("read"):
                    cursor, keys = server.scan(cursor or 0, match=pattern, count=SCAN_COUNT)
                yield from (keys[start : start + size] for start in range(0, len(keys), size))

    def run(self, script: str, keys: Sequence[str | bytes], arguments: Sequence[str | bytes | int]) -> Any:
        """The answer of a Lua script. It may run twice if the connection breaks: it must be written for that.

        On a cluster all keys must be in one slot.
        """
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
        """The server's memory. Of a cluster, what it would be if every node were as full as the fullest one.

        So a sum over all records may be compared with it. The fullest is the one with the least room for its part of
        the slots. The policy is that of any node that evicts what has no expiry, if there is one.
        """
        answers = self._of_each_server("say how much memory it uses", lambda server: server.info("memory"))
        found = [_of_all(info, part) for info, part in answers]
        fullest = min(found, key=lambda one: one.limit - one.used if one.limit else float("inf"))
        evicting = [one.policy for one in found if one.policy.startswith("allkeys")]
        return fullest._replace(policy=evicting[0] if evicting else fullest.policy)

    def memory_of(self, keys: Sequence[str]) -> list[int]:
        """Bytes that the server needs for each key and its value, its own bookkeeping included; 0 for a missing key."""
        commands = [("MEMORY USAGE", key, "SAMPLES", 0) for key in keys]
        return [size or 0 for size in self._each("say how much memory a record takes", commands)]

    def server_ids(self) -> list[str]:
        """What each server that holds records calls itself since it was started, sorted.

        Another answer than before: one of them was restarted or replaced, and may have lost what was written.
        """
        with self._translated("say who it is"):
            if self._clustered:
                self._redis.nodes_manager.initialize()
        answers = self._of_each_server("say who it is", lambda server: server.info("server"))
        return sorted(info["run_id"] for info, _ in answers)

    def save(self) -> None:
        """Write everything to the servers' disks before returning."""
        self._of_each_server("save", lambda server: server.save())

    def _of_each_server(self, what: str, question: Callable[[Any], Any]) -> list[tuple[Any, float]]:
        """The answer of each server that holds records, and which part of the slots it has.

        redis-py repeats nothing that a cluster's node is asked directly, so a node that takes too long to answer, or
        has just lost its slots to another, is asked again here.
        """
        with self._translated(what):
            try:
                return [(question(server), part) for server, part in self._parts()]
            except NOT_REACHED:
                if not self._clustered:
                    raise
                self._redis.nodes_manager.initialize()
                return [(question(server), part) for server, part in self._parts()]

    def _parts(self) -> list[tuple[Any, float]]:
        """A client of each server that holds records, and which part of the slots it has."""
        if not self._clustered:
            return [(self._redis, 1.0)]
        owners = [nodes[0] for nodes in self._redis.nodes_manager.slots_cache.values()]
        counts = Counter(node.name for node in owners)
        nodes = {node.name: self._redis.get_redis_connection(node) for node in owners}
        return [(nodes[name], count / len(owners)) for name, count in sorted(counts.items())]

    def _each(self, what: str, commands: Sequence[Command]) -> list[Any]:
        """The answers to the commands, in their order."""
        with self._translated(what):
            answers = self._on_cluster(commands) if self._clustered else _pipelined(self._redis, commands)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

    def _on_cluster(self, commands: Sequence[Command]) -> list[Any]:
        """redis-py's own pipeline would ask a node that hangs again for each command, and wait as long for each."""
        try:
            answers = self._by_node(commands)
        except NOT_REACHED:
            self._redis.nodes_manager.initialize()
            answers = self._by_node(commands)
        return [
            self._redis.execute_command(*command) if isinstance(answer, SLOT_MOVES) else answer
            for command, answer in zip(commands, answers, strict=True)
        ]

    def _by_node(self, commands: Sequence[Command]) -> list[Any]:
        places = defaultdict(list)
        for place, command in enumerate(commands):
            places[self._redis.get_node_from_key(command[1])].append(place)
        answers: list[Any] = [None] * len(commands)
        for node, own in places.items():
            found = _pipelined(self._redis.get_redis_connection(node), [commands[place] for place in own])
            for place, answer in zip(own, found, strict=True):
                answers[place] = answer
        return answers

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis_errors.OutOfMemoryError as error:
            raise StoreFullError(
                f"store {self.name} is full, it has reached its maxmemory: raise that or free memory (gc --now), "
                "then build again"
            ) from error
        except redis_errors.MovedError as error:
            raise StoreError(
                f"store {self.name} is one node of a cluster: give it as redis+cluster:// or rediss+cluster://"
            ) from error
        except THIRD_PARTY_ERRORS as error:
            raise StoreError(f"store {self.name} did not {what}: {type(error).__name__}: {error}") from error


def _pipelined(server: Any, commands: Sequence[Command]) -> list[Any]:
    """One server's answers in one round trip, errors among them."""
    pipeline = server.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    # raise_on_error would put the command, a user's record, into the message.
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    return answers


def _of_all(info: dict[str, Any], part: float) -> Memory:
    """The memory of a store whose servers are all as full as this one, which has that part of the records."""
    used, limit = round(info["used_memory"] / part), round(info.get("maxmemory", 0) / part)
    return Memory(used, limit, info.get("maxmemory_policy", "unknown"))
