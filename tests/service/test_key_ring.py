"""The keys in force: from file and variable, and changed while the service runs, as Kubernetes changes them."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.access import key_ring
from service.access.api_keys import ApiKey, Role, digest_of
from service.access.key_ring import MAX_FILE_BYTES, KeyRing
from service.errors import ApiKeysError, Unauthorized
from service.metrics import Metrics
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
BODY = {"user_id": USER, "candidates": [item_id("int", 1)]}


def line(name: str, expires: datetime | None = None, key: str = "") -> str:
    """The line of a key that is its name, or `key`."""
    return ApiKey(name, Role.SCORE, digest_of((key or name).encode()), expires).line()


class Rings:
    """A file of keys, and what keeps them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys"
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)

    def write(self, *lines: str) -> None:
        self.file.write_text("\n".join(lines))

    def ring(self, variable: str | None = None) -> KeyRing:
        return KeyRing(self.file, variable, self.metrics)

    def reloads(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("lrea_api_key_reloads_total", {"outcome": outcome})

    def expiry_s(self) -> float:
        return self.registry.get_sample_value("lrea_api_key_expiry_seconds") or 0.0


@pytest.fixture
def rings(tmp_path: Path) -> Rings:
    return Rings(tmp_path)


def holds(ring: KeyRing, key: str) -> bool:
    try:
        return ring.holder(key.encode()).name == key
    except Unauthorized:
        return False


def test_file_and_variable_count_together(rings: Rings) -> None:
    rings.write(line("a"), line("b"))
    ring = rings.ring(f"{line('c')};{line('d')}\n# a comment\n{line('e')};")
    assert [holds(ring, key) for key in "abcdef"] == [True] * 5 + [False]
    only_variable = KeyRing(None, line("c"), rings.metrics)
    assert [holds(only_variable, key) for key in "ac"] == [False, True]


@pytest.mark.parametrize(
    ("lines", "variable", "said"),
    [
        ([], None, "LREA_API_KEYS_FILE: there is no key"),
        ([], "", "LREA_API_KEYS_FILE and LREA_API_KEYS: there is no key"),
        (["a"], line("b"), "LREA_API_KEYS_FILE, line 1: found 1 words"),
        ([line("a")], f"{line('b')};x y z", "LREA_API_KEYS, line 2: the role is 'y'"),
        ([line("a")], line("a", key="other"), "LREA_API_KEYS_FILE and LREA_API_KEYS: two keys are named a"),
        (["x" * MAX_FILE_BYTES + "x"], None, "LREA_API_KEYS_FILE: {file} has more than 1048576 bytes"),
    ],
)
def test_keys_that_cannot_be_used(rings: Rings, lines: list[str], variable: str | None, said: str) -> None:
    rings.write(*lines)
    with pytest.raises(ApiKeysError) as refused:
        rings.ring(variable)
    assert str(refused.value).startswith(said.format(file=rings.file))


def test_a_file_that_cannot_be_read(rings: Rings) -> None:
    with pytest.raises(ApiKeysError, match=r"LREA_API_KEYS_FILE: cannot read .*keys \(No such file or directory\)"):
        rings.ring()
    rings.file.write_bytes(b"\xff\xfe")
    with pytest.raises(ApiKeysError, match="is not UTF-8 text"):
        rings.ring()
    rings.file.write_bytes(b"\xef\xbb\xbf" + line("a").encode())
    assert holds(rings.ring(), "a"), "a byte order mark is no part of the name"


def test_what_is_no_regular_file(tmp_path: Path, rings: Rings) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ApiKeysError, match=f"^LREA_API_KEYS_FILE: {file} is no regular file: put the lines"):
            KeyRing(file, None, rings.metrics)


class SlowFile(type(Path())):  # type: ignore[misc]  # the class of paths on this system
    """A file on a disk that can be taken away."""

    def __init__(self, *_: object) -> None:
        self.asked = 0
        self.there = threading.Event()
        self.there.set()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        self.asked += 1
        assert self.there.wait(60)
        return Path(self).stat(follow_symlinks=follow_symlinks)


async def test_a_read_that_hangs_is_refused_and_not_begun_again(
    rings: Rings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_ring, "READ_S", 0.2)
    rings.write(line("a"))
    file = SlowFile(rings.file)
    ring = KeyRing(file, None, rings.metrics)
    file.there.clear()
    rings.write(line("b"))
    for _ in range(3):
        await ring.poll()
    assert (file.asked, rings.reloads("refused")) == (2, 1), "once at the start, once by all polls"
    assert "has not ended after 0.2 s: is its disk there?" in caplog.text
    assert [holds(ring, key) for key in "ab"] == [True, False]
    monkeypatch.undo()
    file.there.set()
    await ring.poll()
    assert [holds(ring, key) for key in "ab"] == [False, True]
    await ring.poll()
    assert (file.asked, rings.reloads("adopted"), rings.reloads("refused")) == (3, 1, 1)


async def test_a_changed_file_is_adopted(rings: Rings) -> None:
    rings.write(line("a"))
    ring = rings.ring()
    await ring.poll()
    assert rings.reloads("adopted") == 0, "unchanged"
    stamp = rings.file.stat()
    rings.write(line("b"))
    os.utime(rings.file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, inode and time
    await ring.poll()
    assert [holds(ring, key) for key in "ab"] == [False, True]
    assert (rings.reloads("adopted"), rings.reloads("refused")) == (1, 0)


async def test_a_secret_that_kubernetes_replaces(tmp_path: Path, rings: Rings) -> None:
    """keys -> ..data/keys, ..data -> a folder: what changes is the second link."""
    for name in "ab":
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "keys").write_text(line(name))
    (tmp_path / "..data").symlink_to("..a")
    rings.file.symlink_to("..data/keys")
    ring = rings.ring()
    (tmp_path / "..data_tmp").symlink_to("..b")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    await ring.poll()
    assert [holds(ring, key) for key in "ab"] == [False, True]


@pytest.mark.parametrize("broken", ["", "a score nothing", None])
async def test_a_broken_file_changes_nothing(
    rings: Rings, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rings.write(line("a"))
    ring = rings.ring(line("c"))
    if broken is None:
        rings.file.unlink()
    else:
        rings.write(*[broken] if broken else [line("c")])  # the variable's name again
    for _ in range(3):
        await ring.poll()
    assert [holds(ring, key) for key in "ac"] == [True, True]
    assert (rings.reloads("adopted"), rings.reloads("refused")) == (0, 1), "counted once"
    assert caplog.text.count("the API keys stay as they were: LREA_API_KEYS_FILE") == 1
    rings.write(line("b"))
    await ring.poll()
    assert [holds(ring, key) for key in "abc"] == [False, True, True]
    rings.write("broken")
    await ring.poll()
    assert (rings.reloads("adopted"), rings.reloads("refused")) == (1, 2)


async def test_time_to_the_first_expiry_is_shown(rings: Rings) -> None:
    assert rings.expiry_s() == math.inf
    rings.write(line("a"))
    ring = rings.ring()
    assert rings.expiry_s() == math.inf
    now = datetime.now(UTC)
    rings.write(line("a"), line("b", now + timedelta(days=3)), line("c", now + timedelta(days=2)))
    await ring.poll()
    assert rings.expiry_s() == pytest.approx(2 * 86400, abs=60)
    rings.write(line("a"), line("b", now - timedelta(days=1)))
    await ring.poll()
    assert rings.expiry_s() == pytest.approx(-86400, abs=60), "until its line is removed"


def test_a_key_that_expires_while_it_is_in_force(rings: Rings, caplog: pytest.LogCaptureFixture) -> None:
    rings.write(line("a", datetime.now(UTC) + timedelta(seconds=2)), line("b"))
    ring = rings.ring()
    assert holds(ring, "a")
    deadline = time.monotonic() + 20
    while holds(ring, "a"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Unauthorized, match=r"the API key a expired at 20..-..-..T..:..:..Z: ask for a new one"):
        ring.holder(b"a")
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "the API key a has expired, and somebody still asks with it"


def wait_until(true: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_keys_change_while_the_service_runs(cache: Cache, serve: Serve, rings: Rings) -> None:
    cache.publish({USER: [item_id("int", 3)]})
    rings.write(line("old"))
    client = serve(cache, api_keys_file=rings.file)

    def status(key: str) -> int:
        return client.post("/v1/score", json=BODY, headers={"x-api-key": key}).status_code

    assert [status("old"), status("new")] == [200, 401]
    rings.write(line("old"), line("new"))
    wait_until(lambda: status("new") == 200)
    assert status("old") == 200, "both, while callers change over"
    rings.write(line("new"))
    wait_until(lambda: status("old") == 401)
    assert status("new") == 200


def test_a_pipe_in_the_file_s_place_does_not_end_the_reading(
    cache: Cache, serve: Serve, tmp_path: Path, rings: Rings
) -> None:
    cache.publish({USER: [item_id("int", 3)]})
    rings.write(line("old"))
    client = serve(cache, api_keys_file=rings.file, api_keys=f"admin admin sha256:{digest_of(b'admin').hex()}")

    def status(key: str) -> int:
        return client.post("/v1/score", json=BODY, headers={"x-api-key": key}).status_code

    def refused() -> bool:
        text = client.get("/metrics", headers={"x-api-key": "admin"}).text
        return 'lrea_api_key_reloads_total{outcome="refused"} 1.0' in text

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe").rename(rings.file)
    wait_until(refused)
    assert status("old") == 200
    (tmp_path / "new").write_text(line("new"))
    (tmp_path / "new").rename(rings.file)
    wait_until(lambda: status("new") == 200)
