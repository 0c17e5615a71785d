"""API keys as they are configured: one line each, a name, a role and the SHA-256 of the key, never the key.

    # name    role   hash of the key      until when, optional (UTC)
    ranker    score  sha256:<64 hex>      expires=2027-01-31

SHA-256, and no slow hash: those slow down guessing of what people choose. A key here is 32 random bytes, so whoever has
the hash must try 2**255 of them, however fast; and a slow hash would cost each request more than its score.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from service.errors import ApiKeysError

PREFIX = "lrea_"  # secret scanners, and we, tell by it that a text is a key
HASH = "sha256:"
EXPIRES = "expires="
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
HARMLESS = re.compile(r"[a-z]{1,12}|[0-9][0-9T:Z.+-]{0,31}")  # as roles and times look, and no key does


class Role(StrEnum):
    """What a key is for: who_may.py says which routes that is."""

    SCORE = "score"
    MONITOR = "monitor"
    ADMIN = "admin"


@dataclass(frozen=True)
class ApiKey:
    """One key, known by its hash."""

    name: str
    role: Role
    digest: bytes = field(repr=False)
    expires: datetime | None = None

    def has_expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now

    def line(self) -> str:
        """What stands in the file."""
        expires = "" if self.expires is None else f" {EXPIRES}{utc(self.expires)}"
        return f"{self.name} {self.role} {HASH}{self.digest.hex()}{expires}"


def new_key() -> str:
    """A key that nobody else has: 32 random bytes, 43 characters after the prefix."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> bytes:
    """The hash that stands in for a key."""
    return hashlib.sha256(key).digest()


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """The keys in `text`, one per line, those that have expired too. `#` begins a comment.

    source: what messages call the text. Raises ApiKeysError for a line that is no key, and for a name or a key that is
    there twice.
    """
    found: dict[int, ApiKey] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if words:
            try:
                found[number] = parse_line(words)
            except ValueError as error:
                raise ApiKeysError(f"{source}, line {number}: {error}") from None
    return list(found.values())


def check_together(keys: Sequence[ApiKey], source: str) -> None:
    """Raise ApiKeysError unless every name and every key is there once, and one key or more is in force."""
    names, digests = set[str](), dict[bytes, str]()
    for key in keys:
        if key.name in names:
            raise ApiKeysError(f"{source}: two keys are named {key.name}: give each a name of its own")
        if other := digests.get(key.digest):
            raise ApiKeysError(f"{source}: {other} and {key.name} are the same key: give each a key of its own")
        names.add(key.name)
        digests[key.digest] = key.name
    if not keys:
        raise ApiKeysError(f"{source}: there is no key: add one (python -m service.keys new), or unset the variable")
    now = datetime.now(UTC)
    if all(key.has_expired(now) for key in keys):
        raise ApiKeysError(f"{source}: all keys have expired: add a new one (python -m service.keys new)")


def parse_line(words: Sequence[str]) -> ApiKey:
    """The key that the words of one line are. Raises ValueError, which never quotes what may be a key or a hash."""
    if not 3 <= len(words) <= 4:
        found = f"found {len(words)} words"
        raise ValueError(f"{found}, wanted NAME ROLE {HASH}<64 hex digits>, and perhaps {EXPIRES}2027-01-31")
    name, role, digest = check_name(words[0]), _parse_role(words[1]), _parse_digest(words[2])
    return ApiKey(name, role, digest, *map(_parse_expiry, words[3:]))


def check_name(word: str) -> str:
    """Raises ValueError. A name stands in logs and answers, so a key that somebody put there must not become one."""
    if word.startswith(PREFIX) or not NAME.fullmatch(word):
        wanted = f"1 to 64 letters, digits and . _ -, that do not begin with {PREFIX}"
        raise ValueError(f"the name is {_shape(word)}, wanted {wanted}")
    return word


def parse_time(word: str) -> datetime:
    """A date (its first moment) or a time, in UTC where it does not say. Raises ValueError."""
    try:
        found = datetime.fromisoformat(word)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"the expiry is {_shape(word)}, wanted a date or time as 2027-01-31T00:00:00Z") from None


def utc(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _parse_role(word: str) -> Role:
    if word not in tuple(Role):
        raise ValueError(f"the role is {_shape(word)}, wanted {', '.join(Role)}")
    return Role(word)


def _parse_digest(word: str) -> bytes:
    digest = word.removeprefix(HASH)
    if digest.startswith(PREFIX):
        raise ValueError(
            f"the key itself stands where its hash belongs, wanted {HASH}<64 hex digits>: "
            "whoever reads this file has it, so make another (python -m service.keys new)"
        )
    if digest == word or not DIGEST.fullmatch(digest):
        raise ValueError(f"the hash is {_shape(word)}, wanted {HASH}<64 hex digits>")
    return bytes.fromhex(digest)


def _parse_expiry(word: str) -> datetime:
    if not word.startswith(EXPIRES):
        raise ValueError(f"the fourth word is {_shape(word)}, wanted {EXPIRES} and a date")
    return parse_time(word.removeprefix(EXPIRES))


def _shape(word: str) -> str:
    """What was found, without showing what could be a key."""
    return repr(word) if HARMLESS.fullmatch(word) else f"a word of {len(word)} characters"


def shown(keys: Sequence[ApiKey]) -> str:
    """Names, roles and expiries, for the log."""
    return ", ".join(_shown(keys))


def _shown(keys: Sequence[ApiKey]) -> Iterator[str]:
    for key in keys:
        yield f"{key.name} ({key.role}" + (f" until {utc(key.expires)})" if key.expires else ")")
