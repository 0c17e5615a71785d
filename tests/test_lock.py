"""`scripts/lock.py`: what is in a lock, and every file's hash from a real index in both forms of its interface."""

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from scripts.lock import (
    HEADS,
    MAIN,
    Indexes,
    Pin,
    closure,
    kept_pins,
    needs_in,
    parse,
    render,
    taken,
    version_of,
    with_hashes,
)

# pip 23, which Python 3.11 brings, reads its plugins by it.
pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:DeprecationWarning")

A, B, C, D, E = (letter * 64 for letter in "abcde")
PAGES = {
    "/simple/torch/": json.dumps(
        {
            "files": [
                {"filename": "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", "hashes": {"sha256": A}},
                {"filename": "torch-2.13.0.tar.gz", "hashes": {"sha256": B}},
                {"filename": "torch-2.13.0.post1.tar.gz", "hashes": {"sha256": E}},
                {"filename": "torch-2.12.0-cp311-cp311-manylinux_2_28_x86_64.whl", "hashes": {"sha256": E}},
                {"filename": "torch-2.13.0-py3.11.egg", "hashes": {"sha256": E}},
            ]
        }
    ),
    "/cpu/torch/": "<a href='/whl/cpu/'>up</a>\n"
    + "\n".join(
        f'<a href="../../torch-{version}-cp311-cp311-linux_s390x.whl#sha256={sha256}">a file</a><br>'
        for version, sha256 in (("2.13.0%2Bcpu", C), ("2.12.0%2Bcpu", E))
    ),
}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with one index in JSON and one in HTML; what pip is set up with here doesn't count."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGES.get(self.path, "").encode()
            self.send_response(200 if page else 500 if "broken" in self.path else 404)
            form = "application/vnd.pypi.simple.v1+json" if self.path.startswith("/simple/") else "text/html"
            self.send_header("Content-Type", form)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def torch(*hashes: str, version: str = "2.13.0") -> Pin:
    return Pin("torch", version, frozenset(hashes))


def test_hashes_are_those_of_every_file_of_the_release(index: str) -> None:
    assert Indexes(["--index-url", f"{index}/simple"]).hashes(torch()) == {A, B}


def test_an_extra_index_adds_its_builds_of_the_same_release(index: str) -> None:
    flags = ["--index-url", f"{index}/simple/", "--extra-index-url", f"{index}/cpu"]
    assert Indexes(flags).hashes(torch()) == {A, B, C}
    assert Indexes(flags).hashes(Pin("numpy", "2.4.6", frozenset())) == frozenset()  # 404: not every index has it


def test_an_index_that_fails_ends_it(index: str) -> None:
    with pytest.raises(Exception, match="500"):
        Indexes(["--retries", "0", "--index-url", f"{index}/broken"]).hashes(torch())


def test_hashes_of_the_same_release_stay_and_those_of_another_go(index: str) -> None:
    indexes = Indexes(["--index-url", f"{index}/simple"])
    assert with_hashes(torch(D), indexes, {"torch": torch(E)}).hashes == {A, B, D, E}
    assert with_hashes(torch(D), indexes, {"torch": torch(E, version="2.12.0")}).hashes == {A, B, D}
    assert with_hashes(torch(D), indexes, {}).hashes == {A, B, D}


@pytest.mark.parametrize(
    ("filename", "version"),
    [
        ("torch-2.13.0+cpu-cp311-cp311-linux_s390x.whl", "2.13.0"),
        ("python_dateutil-4.0.0.post0-py2.py3-none-any.whl", "4.0.0.post0"),
        ("zope.event-6.2.tar.gz", "6.2"),
        ("pytz-2024a.zip", "2024a0"),
        ("thing-1.0-py3.2.egg", None),
        ("thing-1.0.win32-py3.2.exe", None),
        ("thing-1.0.win32-py3.2.zip", None),
    ],
)
def test_versions_of_files(filename: str, version: str | None) -> None:
    assert version_of(filename) == version


def test_a_lock_is_read_as_it_is_written() -> None:
    pins = [
        torch(B, A),
        Pin("Flask", "3.1.3", frozenset([C])),
        Pin("triton", "3.7.1", frozenset([D]), "os_name == 'x'"),
    ]
    text = render("# a head\n", pins)
    assert text.splitlines() == [
        "# a head",
        "Flask==3.1.3 \\",
        f"    --hash=sha256:{C}",
        "torch==2.13.0 \\",
        f"    --hash=sha256:{A} \\",
        f"    --hash=sha256:{B}",
        "triton==3.7.1 ; os_name == 'x' \\",
        f"    --hash=sha256:{D}",
    ]
    assert parse(text) == {pin.key: pin for pin in pins}
    assert parse("torch==2.13.0\n") == {"torch": torch()}  # of before there were hashes


def test_only_what_is_named_may_change() -> None:
    before = {"torch": torch(), "flask": Pin("Flask", "3.1.3", frozenset())}
    assert kept_pins(before, "") == list(before.values())
    assert kept_pins(before, "Flask") == [before["torch"]]
    assert kept_pins(before, "flask, torch") == []
    assert kept_pins(before, "all") == []
    with pytest.raises(SystemExit, match="names numpi, which no lock has"):
        kept_pins(before, "numpi torch")


def item(name: str, *needs: str, version: str = "1.0", info: dict[str, Any] | None = None) -> dict[str, Any]:
    """A package as pip's report has it."""
    archive = {"archive_info": {"hashes": {"sha256": A}}}
    metadata = {"name": name, "version": version, "requires_dist": list(needs)}
    return {"metadata": metadata, "download_info": info or archive}


def test_a_report_says_what_was_taken_and_what_it_needs() -> None:
    report = [
        item("lrea", "torch>=2", "redis[fast]>=8", "pytest; extra == 'test'", info={"dir_info": {"editable": True}}),
        item("torch", "Sym.Py", "colorama; sys_platform == 'win32'", version="2.13.0+cpu"),
        item("sym-py"),
        item("redis", "hiredis; extra == 'fast'", "xtra; extra == 'slow'"),
        item("hiredis"),
        item("pytest", "torch"),
        item("pip"),
    ]
    assert taken(report).keys() == {"torch", "sym-py", "redis", "hiredis", "pytest"}
    assert taken(report)["torch"] == torch(A)
    assert closure(["lrea"], needs_in(report).__getitem__) == {"lrea", "torch", "sym-py", "redis", "hiredis"}


@pytest.mark.parametrize("lock", HEADS, ids=lambda path: path.name)
def test_the_locks_are_what_make_lock_writes(lock: Path) -> None:
    text = lock.read_text()
    pins = parse(text)
    assert render(HEADS[lock], pins.values()) == text
    assert all(pin.hashes for pin in pins.values())


def test_torch_may_come_from_more_than_one_index() -> None:
    """The CPU build on x86-64 and ARM for the images' Python, as torch's own index has them."""
    assert {
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    } < parse(MAIN.read_text())["torch"].hashes
