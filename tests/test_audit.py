"""`scripts/audit.py` against a real server of advisories: what it finds fails, what it cannot ask is said."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from scripts import audit
from tests.conftest import free_port

ROOT = Path(__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
ADVISORY = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "aliases": ["CVE-2026-1"],
    "summary": "Anybody may do anything.",
    "affected": [
        {
            "package": {"name": "flask", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1.4"}]}],
        }
    ],
}


@pytest.fixture
def advisories() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Address of a server as OSV is one; what it answers, by package (an int is a status); the packages asked for."""
    answers: dict[str, Any] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(f"{query['package']['name']} {query['version']}")
            answer = answers.get(query["package"]["name"], {})
            body = b"" if isinstance(answer, int) else json.dumps(answer).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", answers, asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    lock = tmp_path / "some.lock"
    names = ("annotated-doc==0.0.7", "anyio==4.16.0", "click==8.5.1", "flask==3.1.3")
    lock.write_text("# a head\n" + "".join(f"{name} \\\n    --hash=sha256:{'0' * 64}\n" for name in names))

    def run(url: str, lock: Path = lock) -> "subprocess.CompletedProcess[str]":
        flags = ["--vulnerability-service", "osv", "--osv-url", url, "--cache-dir", str(tmp_path / "cache")]
        command = [sys.executable, "scripts/audit.py", str(lock), "--", *flags]
        return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=50)

    return run


def test_nothing_known_is_zero(advisories: tuple[str, dict[str, Any], list[str]], run: Run) -> None:
    url, _, asked = advisories
    done = run(url)
    assert (done.returncode, done.stdout) == (0, "audited 4 packages, 0 known vulnerabilities\n"), done.stderr
    few = ["annotated-doc 0.0.7", "anyio 4.16.0", "click 8.5.1"]
    assert sorted(asked) == sorted([*few, *few, "flask 3.1.3"])


def test_what_is_known_fails_and_is_named(advisories: tuple[str, dict[str, Any], list[str]], run: Run) -> None:
    url, answers, _ = advisories
    answers["flask"] = {"vulns": [ADVISORY]}
    done = run(url)
    assert (done.returncode, done.stdout) == (1, "audited 4 packages, 1 known vulnerabilities\n")
    first, *advice = done.stderr.splitlines()
    assert first == "flask 3.1.3: CVE-2026-1 = GHSA-aaaa-bbbb-cccc, fixed in 3.1.4"
    assert len(advice) == 1
    assert "make lock UPGRADE=" in advice[0]


def test_nobody_there_is_said_in_one_line(run: Run) -> None:
    done = run(f"http://127.0.0.1:{free_port()}/")
    assert (done.returncode, done.stderr) == (75, "")
    assert done.stdout.startswith("not audited, nobody answers for known vulnerabilities: ")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("package", ["click", "flask"])  # among those that are asked for first, and after them
def test_a_failure_of_the_service_is_no_clean_bill(
    advisories: tuple[str, dict[str, Any], list[str]], run: Run, package: str
) -> None:
    url, answers, _ = advisories
    answers[package] = 503
    done = run(url)
    assert done.returncode == 75
    assert done.stdout.startswith("not audited, ")


def test_a_lock_that_cannot_be_read_is_a_failure_not_a_missing_service(tmp_path: Path, run: Run) -> None:
    lock = tmp_path / "broken.lock"
    lock.write_text("flask >= what\n")
    done = run(f"http://127.0.0.1:{free_port()}/", lock)
    assert done.returncode == 1
    assert "broken.lock" in done.stderr


def test_what_was_accepted_comes_back_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    today = date(2026, 11, 25)
    packages: list[dict[str, Any]] = [
        {"name": "torch", "skip_reason": "not found"},
        {
            "name": "flask",
            "version": "3.1.3",
            "vulns": [{"id": "GHSA-aaaa-bbbb-cccc", "aliases": ["CVE-2026-1"], "fix_versions": []}],
        },
    ]
    line = "flask 3.1.3: CVE-2026-1 = GHSA-aaaa-bbbb-cccc, not fixed yet"
    assert list(audit.findings(packages, today)) == [line]
    monkeypatch.setitem(audit.ACCEPTED, "CVE-2026-1", (today, "we serve no cookies"))
    assert list(audit.findings(packages, today)) == []
    assert list(audit.findings(packages, today + timedelta(days=1))) == [line]


def test_what_is_accepted_says_why() -> None:
    assert all(len(reason) > 10 for _, reason in audit.ACCEPTED.values())
