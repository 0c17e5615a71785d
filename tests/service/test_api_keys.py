"""The lines of API keys: what is read from them, what is refused with which words, and the command that makes them."""

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.access.api_keys import PREFIX, ApiKey, Role, check_together, digest_of, parse_keys
from service.errors import ApiKeysError
from tests.service.keys import key_of
from tests.service.test_documentation import MANUAL

ROOT = Path(__file__).parents[2]
KEY = key_of("ranker")
HASH = f"sha256:{digest_of(KEY.encode()).hex()}"


def test_lines() -> None:
    other = "sha256:" + HASH.removeprefix("sha256:").upper()
    text = f"""
        # whose        role
        ranker         score    {HASH}                                # the nightly one
        prometheus.1   monitor  {other}  expires=2027-01-31
        ops            admin    {HASH}   expires=2027-01-31T12:30:00+02:00
    """
    digest = digest_of(KEY.encode())
    assert parse_keys(text, "here") == [
        ApiKey("ranker", Role.SCORE, digest),
        ApiKey("prometheus.1", Role.MONITOR, digest, datetime(2027, 1, 31, tzinfo=UTC)),
        ApiKey("ops", Role.ADMIN, digest, datetime(2027, 1, 31, 10, 30, tzinfo=UTC)),
    ]


def test_a_line_is_written_as_it_is_read() -> None:
    keys = [
        ApiKey("a", Role.SCORE, digest_of(b"1")),
        ApiKey("b", Role.ADMIN, digest_of(b"2"), datetime(2027, 1, 31, 4, 5, 6, tzinfo=UTC)),
    ]
    assert parse_keys("\n".join(key.line() for key in keys), "here") == keys


def test_an_expiry_is_the_first_moment_at_which_a_key_is_refused() -> None:
    [key] = parse_keys(f"a score {HASH} expires=2027-01-31", "here")
    midnight = datetime(2027, 1, 31, tzinfo=UTC)
    assert [key.has_expired(midnight - timedelta(microseconds=1)), key.has_expired(midnight)] == [False, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ranker", "found 1 words, wanted NAME ROLE sha256:<64 hex digits>, and perhaps expires=2027-01-31"),
        (f"ranker {HASH}", "found 2 words, wanted NAME"),
        (f"ranker score {HASH} expires=2027-01-31 x", "found 5 words, wanted NAME"),
        (f"ranker scorer {HASH}", "the role is 'scorer', wanted score, monitor, admin"),
        (f"ranker SCORE {HASH}", "the role is a word of 5 characters, wanted score, monitor, admin"),
        (f"ranker {KEY} score", "the role is a word of 48 characters, wanted score, monitor, admin"),
        (f"{KEY} score {HASH}", "the name is a word of 48 characters, wanted 1 to 64 letters"),
        (f"a/b score {HASH}", "the name is a word of 3 characters"),
        (f"ранкер score {HASH}", "the name is a word of 6 characters"),
        (f"ranker score {KEY}", "the key itself stands where its hash belongs"),
        (f"ranker score sha256:{KEY}", "the key itself stands where its hash belongs"),
        (f"ranker score {KEY.removeprefix(PREFIX)}", "the hash is a word of 43 characters, wanted sha256:<64 hex"),
        (f"ranker score {HASH.removeprefix('sha256:')}", "the hash is a word of 64 characters, wanted sha256:<64 hex"),
        (f"ranker score {HASH[:-1]}", "the hash is a word of 70 characters, wanted sha256:<64 hex digits>"),
        (f"ranker score {HASH} 2027-01-31", "the fourth word is '2027-01-31', wanted expires= and a date"),
        (f"ranker score {HASH} {KEY}", "the fourth word is a word of 48 characters, wanted expires= and a date"),
        (f"ranker score {HASH} expires={KEY}", "the expiry is a word of 48 characters, wanted a date or time"),
        (f"ranker score {HASH} expires=2027-13-01", "the expiry is '2027-13-01', wanted a date or time as 2027-01-31T"),
        (f"ranker score {HASH} expires=0001-01-01T00:00+14:00", "the expiry is '0001-01-01T00:00+14:00', wanted"),
    ],
)
def test_a_line_that_is_none_is_refused_without_showing_a_key_or_a_hash(line: str, said: str) -> None:
    with pytest.raises(ApiKeysError) as refused:
        parse_keys(f"# keys\n\n{line}\n", "LREA_API_KEYS_FILE")
    message = str(refused.value)
    assert message.startswith(f"LREA_API_KEYS_FILE, line 3: {said}")
    assert refused.value.__cause__ is None
    for secret in (KEY, KEY.removeprefix(PREFIX), HASH.removeprefix("sha256:")[:-1]):
        assert secret not in message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([("a", b"1", None), ("a", b"2", None)], "here: two keys are named a: give each a name of its own"),
        ([("a", b"1", None), ("b", b"1", None)], "here: a and b are the same key: give each a key of its own"),
        ([], "here: there is no key: add one (python -m service.keys new), or unset the variable"),
        ([("a", b"1", -1), ("b", b"2", 0)], "here: all keys have expired: add a new one (python -m service.keys new)"),
    ],
)
def test_keys_that_cannot_be_together(keys: list[tuple[str, bytes, int | None]], said: str) -> None:
    now = datetime.now(UTC)
    parsed = [
        ApiKey(name, Role.SCORE, digest_of(key), None if days is None else now + timedelta(days=days))
        for name, key, days in keys
    ]
    with pytest.raises(ApiKeysError, match=f"^{re.escape(said)}$"):
        check_together(parsed, "here")


def test_one_key_in_force_is_enough() -> None:
    expired = ApiKey("a", Role.SCORE, digest_of(b"1"), datetime(2020, 1, 1, tzinfo=UTC))
    check_together([expired, ApiKey("b", Role.SCORE, digest_of(b"2"))], "here")


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "service.keys", "new", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_the_command_makes_a_key_and_its_line() -> None:
    made = [make("ranker", "--role", "score", "--expires", "2999-01-31") for _ in range(2)]
    keys = []
    for one in made:
        assert (one.returncode, one.stderr) == (0, "")
        key, line = one.stdout.splitlines()
        assert re.fullmatch(r"lrea_[A-Za-z0-9_-]{43}", key)
        assert parse_keys(line, "here") == [
            ApiKey("ranker", Role.SCORE, digest_of(key.encode()), datetime(2999, 1, 31, tzinfo=UTC))
        ]
        keys.append(key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a b", "--role", "score"), "no key made: the name is a word of 3 characters, wanted 1 to 64 letters"),
        (("a", "--role", "score", "--expires", "soon"), "no key made: the expiry is 'soon', wanted a date or time"),
        (("a", "--role", "score", "--expires", "2020-01-31"), "no key made: the expiry is over already"),
    ],
)
def test_the_command_makes_no_key_that_the_service_would_refuse(arguments: tuple[str, ...], said: str) -> None:
    made = make(*arguments)
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr.startswith(said)


def test_the_manual_s_line_is_one() -> None:
    block = MANUAL.partition("```text\n")[2].partition("```")[0]
    [key] = parse_keys(block, "the manual")
    assert (key.name, key.role, key.expires) == ("ranker", Role.SCORE, datetime(2027, 1, 31, tzinfo=UTC))
