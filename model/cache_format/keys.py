"""Every key that the system has in the store, in one place.

    {prefix}:{model_id}:{generation}:u:{user}        one user's record
    {prefix}:{model_id}:{generation}:manifest        what the generation holds, as JSON
    {prefix}:active                                  the pointer that readers follow, as JSON
    {prefix}:lock:{{prefix}:active}                  the build lock             } these braces are in the key: a hash
    {prefix}:unpublished:{{prefix}:active}           what builds have begun     } tag, so that a script on a cluster
    {prefix}:deleting:{{prefix}:active}              what is being deleted      } reaches them and the pointer
    {prefix}:retired:{{prefix}:active}               what shall expire          }
    {prefix}:held:{{prefix}:active}                  what waits for `publish`   }
    {prefix}:leases:{{prefix}:active}                what readers serve         }

Cluster slots are computed over the hash tag where a key has one and over the whole key where it has none: the pointer
carries no braces, so its slot is that of the tag `{prefix}:active`.
"""

import re
import secrets
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote, unquote

from model.identifiers import Id, IdKind, canonical_bytes

MAX_USER_BYTES = 256

_PREFIX = re.compile(r"[^\s{}\x00-\x1f\x7f]+")
_MODEL_ID = re.compile(r"[0-9a-f]{12}")
_GENERATION = re.compile(r"[0-9A-Za-z-]{1,24}")
# One spelling per integer: int() would also take "+1", " 1", "1_0" and other scripts' digits. 19 digits are an int64's.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


def record_key(prefix: str, model_id: str, generation: str, user_id: Id) -> str:
    """The key of one user's record.

    Raises ValueError for an empty id, one of more than 256 bytes of UTF-8, invalid Unicode, or an int beyond int64.
    """
    return f"{generation_prefix(prefix, model_id, generation)}u:{user_in_key(user_id)}"


def user_in_key(user_id: Id) -> str:
    """A user id as the end of his key. Raises ValueError as `record_key` does."""
    canonical_bytes(user_id)  # refuses what is no id, invalid Unicode and integers beyond 64 bits
    text = str(user_id)
    if type(user_id) is int:
        return text  # digits and a minus sign: as they are
    size = len(text.encode("utf-8"))
    if not 1 <= size <= MAX_USER_BYTES:
        raise ValueError(f"user id has {size} bytes of UTF-8, wanted 1 to {MAX_USER_BYTES}: use a shorter id")
    return _percent_encoded(text)


def user_from_key(key: str, prefix: str, model_id: str, generation: str, kind: IdKind) -> Id:
    """The user id that `record_key` made `key` from. Raises ValueError if it did not make it."""
    head = generation_prefix(prefix, model_id, generation) + "u:"
    encoded = key.removeprefix(head)
    try:
        user_id = user_from_text(unquote(encoded, errors="strict"), kind)
        if key.startswith(head) and record_key(prefix, model_id, generation, user_id) == key:
            return user_id
    except ValueError:
        pass
    raise ValueError(f"{key!r} is not the key of a record of {head}… with {kind} user ids: list that generation's keys")


def user_from_text(text: str, kind: IdKind) -> Id:
    """The user id that `text` spells, of the bundle's kind. Raises ValueError for what is not the one spelling of it.

    Of strings every text is one; whether it may be in a key, `record_key` says.
    """
    if kind == "string":
        return text
    _check("user id", _INTEGER, text, "an integer, in decimal digits")
    user_id = int(text)
    canonical_bytes(user_id)  # refuses integers beyond 64 bits
    return user_id


@lru_cache  # a build asks for every user
def generation_prefix(prefix: str, model_id: str, generation: str) -> str:
    """What every key of one generation begins with, and no other key does."""
    check_prefix(prefix)
    check_model_id(model_id)
    _check("generation", _GENERATION, generation, "1 to 24 of [0-9A-Za-z-]")
    return f"{prefix}:{model_id}:{generation}:"


def manifest_key(prefix: str, model_id: str, generation: str) -> str:
    """The key of a generation's manifest."""
    return generation_prefix(prefix, model_id, generation) + "manifest"


def active_key(prefix: str) -> str:
    """The key of the pointer to what is published."""
    return f"{check_prefix(prefix)}:active"


def lock_key(prefix: str) -> str:
    """The key of the build lock, in the pointer's cluster slot."""
    return f"{prefix}:lock:{{{active_key(prefix)}}}"


def unpublished_key(prefix: str) -> str:
    """The key of the set of generations that were begun and neither published nor deleted, in the pointer's slot."""
    return f"{prefix}:unpublished:{{{active_key(prefix)}}}"


def deleting_key(prefix: str) -> str:
    """The key of the set of generations that can no longer be published and whose keys are being deleted."""
    return f"{prefix}:deleting:{{{active_key(prefix)}}}"


def retired_key(prefix: str) -> str:
    """The key of the set of generations that the pointer no longer names and whose keys have no expiry yet."""
    return f"{prefix}:retired:{{{active_key(prefix)}}}"


def held_key(prefix: str) -> str:
    """The key of the set of unpublished generations that are whole and wait to be published by hand."""
    return f"{prefix}:held:{{{active_key(prefix)}}}"


def leases_key(prefix: str) -> str:
    """The key of the sorted set of what readers serve: a `lease_member` each, by the millisecond at which it ends."""
    return f"{prefix}:leases:{{{active_key(prefix)}}}"


def lease_member(model_id: str, generation: str, reader: str) -> str:
    """One reader's lease on a generation. reader: any name that no other reader has."""
    return f"{check_model_id(model_id)}:{generation}:{reader}"


def check_prefix(prefix: str) -> str:
    """`prefix` itself. Raises ValueError if it is empty or has braces, white space or control characters."""
    _check("key prefix", _PREFIX, prefix, "some text without braces, white space and control characters")
    return prefix


def is_model_id(text: str) -> bool:
    """Whether `text` has the form of a model id."""
    return _MODEL_ID.fullmatch(text) is not None


def check_model_id(text: str) -> str:
    """`text` itself. Raises ValueError unless it has the form of a model id."""
    _check("model id", _MODEL_ID, text, "12 lowercase hex digits")
    return text


def new_generation(now: datetime) -> str:
    """UTC to the second and 24 random bits, `20261123T165357-3fa29c`.

    Names of different seconds sort by time, those of one second at random; two of them are equal once in 16 million.
    """
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _percent_encoded(text: str) -> str:
    # quote() keeps "." and "~" whatever it is told; we keep [A-Za-z0-9_-] and nothing else.
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E")


def _check(what: str, grammar: re.Pattern[str], value: str, wanted: str) -> None:
    if not grammar.fullmatch(value):
        raise ValueError(f"{what} {value!r} is not valid: wanted {wanted}")
