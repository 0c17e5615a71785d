"""Keys: their exact text, their inverse, and the slots they fall into."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from model.cache_format import (
    active_key,
    check_model_id,
    deleting_key,
    generation_prefix,
    held_key,
    is_model_id,
    lease_member,
    leases_key,
    lock_key,
    manifest_key,
    new_generation,
    record_key,
    retired_key,
    unpublished_key,
    user_from_key,
    user_from_text,
)
from model.identifiers import INT64_MAX, INT64_MIN, Id, IdKind

MODEL = "3f2a00c0ffee"
GENERATION = "20261123T165357-3fa29c"
HEAD = f"lrea:{MODEL}:{GENERATION}"


@pytest.mark.parametrize(
    ("user_id", "encoded"),
    [
        (7, "7"),
        (-12, "-12"),
        ("7", "7"),
        ("a_B-9", "a_B-9"),
        ("a.b~c", "a%2Eb%7Ec"),
        ("a:u:{b}*", "a%3Au%3A%7Bb%7D%2A"),
        ("é 100%", "%C3%A9%20100%25"),
        ("\x00", "%00"),
    ],
)
def test_record_key_percent_encodes_the_user(user_id: Id, encoded: str) -> None:
    assert record_key("lrea", MODEL, GENERATION, user_id) == f"{HEAD}:u:{encoded}"


def test_the_other_keys() -> None:
    assert manifest_key("lrea", MODEL, GENERATION) == f"{HEAD}:manifest"
    assert generation_prefix("lrea", MODEL, GENERATION) == f"{HEAD}:"
    assert active_key("lrea") == "lrea:active"
    assert lock_key("lrea") == "lrea:lock:{lrea:active}"
    assert unpublished_key("lrea") == "lrea:unpublished:{lrea:active}"
    assert deleting_key("lrea") == "lrea:deleting:{lrea:active}"
    assert retired_key("lrea") == "lrea:retired:{lrea:active}"
    assert held_key("lrea") == "lrea:held:{lrea:active}"
    assert leases_key("lrea") == "lrea:leases:{lrea:active}"
    assert lease_member(MODEL, GENERATION, "host-1.7") == f"{MODEL}:{GENERATION}:host-1.7"


def test_the_pointer_and_what_guards_it_share_a_cluster_slot() -> None:
    keys = (
        active_key("p"),
        lock_key("p"),
        unpublished_key("p"),
        deleting_key("p"),
        retired_key("p"),
        held_key("p"),
        leases_key("p"),
    )
    slots = {key_slot(key.encode()) for key in keys}
    assert len(slots) == 1


@given(st.one_of(st.integers(INT64_MIN, INT64_MAX), st.text(min_size=1, max_size=64)))
def test_a_key_names_exactly_one_user(user_id: Id) -> None:
    kind: IdKind = "int" if isinstance(user_id, int) else "string"
    key = record_key("lrea", MODEL, GENERATION, user_id)
    assert user_from_key(key, "lrea", MODEL, GENERATION, kind) == user_id
    assert key.isascii()


@pytest.mark.parametrize(
    "key",
    [
        f"{HEAD}:manifest",
        f"{HEAD}:u:",
        f"{HEAD}:u:007",
        f"{HEAD}:u:+7",
        f"{HEAD}:u:seven",
        f"{HEAD}:u:%37",  # an encoding that record_key does not write
        f"{HEAD}:u:٧",  # a digit, but not one of ours
        f"lrea:{MODEL}:other:u:7",
        f"{HEAD}:u:{2**63}",
    ],
)
def test_what_is_not_an_integer_users_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is not the key of a record"):
        user_from_key(key, "lrea", MODEL, GENERATION, "int")


def test_a_key_with_bytes_that_are_not_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the key of a record"):
        user_from_key(f"{HEAD}:u:%FF", "lrea", MODEL, GENERATION, "string")


@pytest.mark.parametrize("text", ["0", "7", "-12", str(INT64_MAX), str(INT64_MIN)])
def test_an_integer_has_one_spelling(text: str) -> None:
    assert user_from_text(text, "int") == int(text)
    assert user_from_text(text, "string") == text


@pytest.mark.parametrize("text", ["", "+7", "-0", "007", " 7", "1_0", "٧", "7\n", "true", str(2**63), "9" * 5000])
def test_what_spells_no_integer(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted an integer|does not fit"):
        user_from_text(text, "int")


@pytest.mark.parametrize("user_id", ["", "x" * 257, "é" * 129, "\ud800", 2**63, True])
def test_users_that_have_no_key(user_id: Id) -> None:
    with pytest.raises(ValueError, match=r"id"):
        record_key("lrea", MODEL, GENERATION, user_id)


def test_256_bytes_are_allowed() -> None:
    assert record_key("lrea", MODEL, GENERATION, "é" * 128).endswith("%C3%A9" * 128)


@pytest.mark.parametrize("prefix", ["", "a b", "a{b", "a}b", "a\n", "a\x7f"])
def test_prefixes_that_would_break_keys_are_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="key prefix"):
        active_key(prefix)


@pytest.mark.parametrize("model_id", ["", "3F2A00C0FFEE", "3f2a00c0ffee1", "3f2a00c0ffe\n"])
def test_model_ids_have_one_form(model_id: str) -> None:
    assert is_model_id(MODEL)
    assert check_model_id(MODEL) == MODEL
    assert not is_model_id(model_id)
    with pytest.raises(ValueError, match=r"model id .* is not valid: wanted 12 lowercase hex digits"):
        check_model_id(model_id)
    with pytest.raises(ValueError, match="model id"):
        manifest_key("lrea", model_id, GENERATION)


@pytest.mark.parametrize("generation", ["", "a:b", "x" * 25, "a_b", "abc\n"])
def test_generations_have_one_form(generation: str) -> None:
    with pytest.raises(ValueError, match="generation"):
        manifest_key("lrea", MODEL, generation)


def test_generations_are_named_by_utc_time_and_differ() -> None:
    now = datetime(2026, 11, 23, 17, 53, 57, tzinfo=timezone(timedelta(hours=1)))
    names = {new_generation(now) for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("20261123T165357-") and len(name) == 22 for name in names)
    assert new_generation(datetime(2026, 11, 23, tzinfo=UTC)) < min(names)
    assert all(generation_prefix("lrea", MODEL, name) for name in names)
