"""The build lock: who may publish.

It expires, so that a builder that died does not stop the next one, and a thread renews it for as long as its holder
lives. A builder that was suspended past its expiry finds out when it renews; what it would flip or sweep in between is
refused on the server.

Each script recognises its own earlier success, because a broken connection makes the client repeat it.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import orjson

from cache_builder.errors import GenerationGoneError, LockHeldError, LockLostError, StoreError
from cache_builder.store import Store
from model.cache_format import ActivePointer, ManifestError, Published, active_key, lock_key, unpublished_key

LOCK_TTL_S = 60.0
RENEWALS_PER_TTL = 4
LOST = "the build lock expired or was taken over during the build: look who builds, then build again"
WAIT = f"wait until it ends or, where it was killed, {LOCK_TTL_S:g} s until its lock expires"
JOIN_S = 2.0  # a renewal may be waiting for a store that hangs; it harms nobody, since the lock's value is gone

# Taking the lock and noting the generation are one step: what is written later is on record before its first byte. A
# build that goes on takes its lock again, which may not have expired, and only if its generation is still noted: else
# somebody has begun to delete it. The same holds for what is published after its build has ended.
# A full store refuses a script that begins with a write which may need memory, and no later one: DEL goes first, or
# nobody could free memory there.
_ACQUIRE = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
if ARGV[4] == 'noted' and redis.call('SISMEMBER', KEYS[2], ARGV[3]) == 0 then return 'gone' end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if ARGV[4] == 'new' then redis.call('SADD', KEYS[2], ARGV[3]) end
return false
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# Once it is released no flip of ours can succeed: only then does the pointer say for certain whether one has.
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return redis.call('GET', KEYS[2])
"""


@dataclass(frozen=True)
class LockValue:
    """What the lock's key holds: who is building what since when, and a token that nobody else has."""

    holder: str  # host:process
    model_id: str  # empty where nothing is built
    generation: str
    since_ms: int  # Unix time
    token: str

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS)


class BuildLock:
    """The lock of one build of one generation, or of what else needs it. `acquire`, then `release` in every case."""

    def __init__(
        self, store: Store, prefix: str, building: Published | None, ttl_s: float = LOCK_TTL_S,
        begun: bytes | None = None, *, noted: bool = False,
    ) -> None:  # fmt: skip
        """building: None where nothing is written. noted: it was written by a build that has ended.

        begun: the value of the lock that the same build had in a process that has ended; None: a new one's.
        """
        self._store, self._prefix, self._ttl_s = store, prefix, ttl_s
        self.building = building
        self._key = lock_key(prefix)
        self._kind = "none" if building is None else "noted" if noted or begun is not None else "new"
        self.value = (
            begun
            or LockValue(
                holder=f"{socket.gethostname()}:{os.getpid()}",
                model_id=building.model_id if building else "",
                generation=building.generation if building else "",
                since_ms=time.time_ns() // 1_000_000,
                token=secrets.token_hex(16),
            ).to_json()
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="build-lock", daemon=True)

    def check_free(self) -> None:
        """Raise LockHeldError, naming the holder, if somebody has it: before what `acquire` would come too late for."""
        held = self._store.get(self._key)
        if held is not None:
            raise _held(held)

    def acquire(self) -> None:
        """Take the lock and begin to renew it.

        Raises LockHeldError, naming the holder, or GenerationGoneError if what was begun before is not there any more.
        """
        keys = [self._key, unpublished_key(self._prefix)]
        values: list[str | bytes | int] = [self.value, self._ttl_ms, self.member, self._kind]
        held = self._store.run(_ACQUIRE, keys, values)
        if held == b"gone":
            assert self.building is not None
            raise GenerationGoneError(
                f"generation {self.building.generation} was published, or another build has begun to delete it: "
                "build anew, without --resume"
            )
        if held is not None:
            raise _held(held)
        self._thread.start()

    def renew(self) -> None:
        """Put the expiry off. Raises LockLostError if the lock is not ours."""
        keep_lock(self._store, self._prefix, self.value, self._ttl_s)

    def release(self) -> ActivePointer | None:
        """Give the lock back, once or again; the pointer as it was then. No flip with this lock succeeds afterwards."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        active: bytes | None = self._store.run(_RELEASE, [self._key, active_key(self._prefix)], [self.value])
        return None if active is None else ActivePointer.from_json(active)

    @property
    def member(self) -> str:
        """What is built, as in a set of generations; empty where nothing is."""
        return member(self.building) if self.building else ""

    @property
    def _ttl_ms(self) -> int:
        return round(self._ttl_s * 1000)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._ttl_s / RENEWALS_PER_TTL):
            try:
                self.renew()
            except LockLostError:
                return
            except StoreError:
                continue  # it may answer again before the lock expires; if not, the next renewal or the flip will tell


@contextmanager
def holding(lock: BuildLock, note: Callable[[str], None]) -> Iterator[None]:
    """Acquire, and release in every case: a lock that cannot be released expires, and spoils nothing that was done."""
    lock.acquire()
    try:
        yield
    finally:
        try:
            lock.release()
        except (StoreError, ManifestError) as error:
            note(f"the build lock stays until it expires: {error}")


def keep_lock(store: Store, prefix: str, value: bytes, ttl_s: float) -> None:
    """Put a lock's expiry off. Raises LockLostError if the lock is not the one of this value."""
    if not store.run(_RENEW, [lock_key(prefix)], [value, round(ttl_s * 1000)]):
        raise LockLostError(LOST)


def member(published: Published) -> str:
    """A generation in a set of generations."""
    return f"{published.model_id}:{published.generation}"


def from_member(name: bytes) -> Published:
    """The generation that `member` named."""
    model_id, _, generation = name.decode().partition(":")
    return Published(model_id, generation)


def _held(value: bytes) -> LockHeldError:
    return LockHeldError(f"another build is running, {describe(value)}: {WAIT}")


def describe(value: bytes) -> str:
    """The holder of a lock in words, for whatever a lock's key may hold."""
    try:
        lock = LockValue(**orjson.loads(value))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(lock.since_ms / 1000))
    except (orjson.JSONDecodeError, TypeError, ValueError, OverflowError):
        return f"held by {value[:80]!r}"
    if not lock.generation:
        return f"{lock.holder} removing what nobody needs since {since} UTC"
    return f"{lock.holder} building {lock.generation} of model {lock.model_id} since {since} UTC"
