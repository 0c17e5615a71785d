"""The service over TLS: whom it serves, whom it refuses, and what is said of files that will not do."""

import asyncio
import resource
import signal
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.access.tls import server_context
from service.errors import StartupError
from service.http.seats import RESERVED
from service.process.serve import compose
from service.settings import Settings
from tests.cache_builder.tls import Pair, make_pair
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.serving import running_service
from tests.service.test_main import process_of, wait_for_status
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
BODY = {"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}


@dataclass(frozen=True)
class Papers:
    """Who has signed what."""

    authority: Pair
    server: Pair
    client: Pair
    stranger: Pair  # of an authority that nobody knows
    locked: Path  # the server's key, with a passphrase

    def trusting(self, shown: Pair | None = None) -> ssl.SSLContext:
        """A client's side: it trusts our authority and shows this certificate."""
        context = ssl.create_default_context(cafile=self.authority.cert)
        if shown is not None:
            context.load_cert_chain(shown.cert, shown.key)
        return context


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    authority, elsewhere = make_pair(folder, "authority"), make_pair(folder, "elsewhere")
    server, locked = make_pair(folder, "server", authority, "IP:127.0.0.1"), folder / "locked.key"
    lock = ["openssl", "ec", "-in", str(server.key), "-out", str(locked), "-aes128", "-passout", "pass:secret"]
    subprocess.run(lock, check=True, capture_output=True)
    return Papers(
        authority, server, make_pair(folder, "client", authority), make_pair(folder, "stranger", elsewhere), locked
    )


def settings(cache: Cache, papers: Papers, **others: object) -> dict[str, Any]:
    cache.publish({USER: [item_id("int", 3)]})
    files = {"tls_certificate_file": papers.server.cert, "tls_key_file": papers.server.key}
    return {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, **files, **others}


@pytest.fixture
def client(cache: Cache, papers: Papers) -> Iterator[httpx.Client]:
    with running_service(papers.trusting(), **settings(cache, papers)) as client:
        yield client


def address(client: httpx.Client) -> tuple[str, int]:
    return "127.0.0.1", client.base_url.port or 0


def test_scores_over_tls(client: httpx.Client, papers: Papers) -> None:
    assert client.base_url.scheme == "https"
    answer = client.post("/v1/score", json=BODY)
    assert (answer.status_code, answer.json()["user_state"]) == (200, "cached")
    with (
        socket.create_connection(address(client)) as plain,
        papers.trusting().wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        assert connection.version() == "TLSv1.3"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(client.base_url, trust_env=False)


@contextmanager
def mute(address: tuple[str, int], count: int) -> Iterator[list[socket.socket]]:
    """Connections on which nothing is ever sent."""
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(count)]


def test_a_handshake_has_the_time_of_a_head(cache: Cache, papers: Papers) -> None:
    with (
        running_service(papers.trusting(), **settings(cache, papers, header_timeout_s=0.5)) as client,
        mute(address(client), 3) as connections,
    ):
        assert [connection.recv(1) for connection in connections] == [b""] * 3
        assert client.post("/v1/score", json=BODY).status_code == 200


def test_connections_that_shake_hands_count(cache: Cache, papers: Papers) -> None:
    """Beyond the most of them a caller is told to go, a probe is answered, and beyond the reserve nobody is taken."""
    with running_service(
        papers.trusting(), **settings(cache, papers, max_connections=3, header_timeout_s=600)
    ) as client:
        client.close()  # it holds a connection of its own
        with mute(address(client), 3), httpx.Client(base_url=client.base_url, verify=papers.trusting()) as late:
            assert late.get("/livez").status_code == 200
            answer = late.post("/v1/score", json=BODY)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:lrea:problem:too-many-connections")
            with mute(address(client), RESERVED + 20) as crowd:
                assert crowd[-1].recv(1) == b"", "closed at once"
                assert crowd[0].recv(1) == b"", "closed after a second"
            assert late.get("/livez").status_code == 200
        with httpx.Client(base_url=client.base_url, verify=papers.trusting(), timeout=30) as later:
            deadline = time.monotonic() + 20
            while later.post("/v1/score", json=BODY).status_code == 503:
                assert time.monotonic() < deadline, "when they have left, everybody is answered"


FEW_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
runpy.run_module("service", run_name="__main__", alter_sys=True)
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 5500, reason="needs 5,500 open files")
def test_probes_are_answered_beside_5000_mute_connections_with_1024_files(
    cache: Cache, papers: Papers, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    values = settings(cache, papers, port=free_port(), header_timeout_s=600)
    try:
        with (
            (tmp_path / "log").open("w") as log,
            process_of([], values, log, program=("-c", FEW_FILES)) as service,
            httpx.Client(base_url=f"https://127.0.0.1:{values['port']}", verify=papers.trusting()) as client,
        ):
            wait_for_status(service, client, "/readyz", 200)
            client.close()  # before the crowd comes, or its seat would be free for the next
            with mute(address(client), 5000):
                with httpx.Client(base_url=client.base_url, verify=papers.trusting()) as prober:
                    wait_for_status(service, prober, "/livez", 200)
                    assert prober.post("/v1/score", json=BODY).status_code == 503, "the crowd is still there"
                service.send_signal(signal.SIGTERM)
                assert service.wait(30) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "raise its limit (ulimit -Hn), or set fewer; it is 704 until then" in said
    assert f"serving on 127.0.0.1 port {values['port']}, https" in said


async def test_nobody_in_the_queue_holds_up_a_service_that_stops(cache: Cache, papers: Papers) -> None:
    values = settings(cache, papers, port=free_port(), device="cpu", grace_seconds=5)
    async with compose(Settings(**values), CollectorRegistry()) as server:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        with mute(("127.0.0.1", values["port"]), 5) as connections:  # this loop has not turned: they are in the queue
            await asyncio.wait_for(server.shutdown(), timeout=30)
            assert [connection.recv(1) for connection in connections] == [b""] * 5
        server.should_exit = True
        await serving


def test_plain_http_is_refused_and_does_no_harm(client: httpx.Client) -> None:
    for _ in range(3):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{client.base_url.port}/livez")
    for nonsense in (b"", b"\x00" * 100, b"\x16\x03\x01"):
        with socket.create_connection(address(client)) as connection:
            connection.sendall(nonsense)
    assert client.post("/v1/score", json=BODY).status_code == 200


def test_old_versions_of_tls_are_refused(client: httpx.Client, papers: Papers) -> None:
    """Of two clients that differ in nothing else, the one that goes no further than 1.1 is not served."""
    for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1):
        context = papers.trusting()
        context.set_ciphers("DEFAULT@SECLEVEL=0")  # or OpenSSL would not let the client ask for 1.1
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
        with socket.create_connection(address(client)) as plain:
            if newest == ssl.TLSVersion.TLSv1_2:
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                    assert connection.version() == "TLSv1.2"
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_client_s_certificate_is_asked_for(cache: Cache, papers: Papers) -> None:
    values = settings(cache, papers, tls_client_ca_file=papers.authority.cert)
    with running_service(papers.trusting(papers.client), **values) as client:
        assert client.post("/v1/score", json=BODY).json()["user_state"] == "cached"
        for shown in (None, papers.stranger):
            with (
                httpx.Client(base_url=client.base_url, verify=papers.trusting(shown)) as other,
                pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)),
            ):
                other.get("/livez")
        assert client.post("/v1/score", json=BODY).status_code == 200


@pytest.mark.timeout(120)
def test_workers_over_tls(cache: Cache, papers: Papers, tmp_path: Path) -> None:
    port = free_port()
    values = settings(cache, papers, port=port, store_timeout_ms=2000)
    with (
        (tmp_path / "log").open("w") as log,
        process_of(["--workers", "2"], values, log) as service,
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=papers.trusting()) as client,
    ):
        wait_for_status(service, client, "/readyz", 200)
        assert client.post("/v1/score", json=BODY).json()["user_state"] == "cached"
        stopped = time.monotonic()
        service.terminate()
        assert service.wait(40) == 0
        assert time.monotonic() - stopped < 20, "a caller who keeps his connection holds nobody up"
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("server.cert", None, None), "LREA_TLS_CERTIFICATE_FILE without LREA_TLS_KEY_FILE: set both, or none"),
        ((None, "server.key", None), "LREA_TLS_KEY_FILE without LREA_TLS_CERTIFICATE_FILE: set both, or none"),
        (
            (None, None, "authority.cert"),
            "LREA_TLS_CLIENT_CA_FILE without LREA_TLS_CERTIFICATE_FILE and LREA_TLS_KEY_FILE: set both, or none",
        ),
        (
            ("missing", "server.key", None),
            "LREA_TLS_CERTIFICATE_FILE: cannot read {missing} (No such file or directory)",
        ),
        (("server.cert", "missing", None), "LREA_TLS_KEY_FILE: cannot read {missing} (No such file or directory)"),
        (("server.cert", "server.key", "missing"), "LREA_TLS_CLIENT_CA_FILE: cannot read {missing} (No such file"),
        (
            ("server.cert", "client.key", None),
            "LREA_TLS_KEY_FILE: {client.key} is not the key of the first certificate in",
        ),
        (("server.key", "server.cert", None), "LREA_TLS_CERTIFICATE_FILE and LREA_TLS_KEY_FILE: {server.key} and"),
        (("server.cert", "locked", None), "LREA_TLS_KEY_FILE: {locked} has a passphrase, wanted a key without one"),
        (
            ("server.cert", "server.key", "server.key"),
            "LREA_TLS_CLIENT_CA_FILE: {server.key} has no certificate in PEM",
        ),
    ],
)
def test_files_that_will_not_do(
    papers: Papers, tmp_path: Path, files: tuple[str | None, str | None, str | None], said: str
) -> None:
    paths = {
        "missing": tmp_path / "missing",
        "locked": papers.locked,
        "authority.cert": papers.authority.cert,
        "server.cert": papers.server.cert,
        "server.key": papers.server.key,
        "client.key": papers.client.key,
    }
    for name, path in paths.items():
        said = said.replace(f"{{{name}}}", str(path))
    certificate, key, client_ca = (None if name is None else paths[name] for name in files)
    with pytest.raises(StartupError) as refused:
        server_context(certificate, key, client_ca)
    assert str(refused.value).startswith(said)


def test_without_files_there_is_no_tls() -> None:
    assert server_context(None, None, None) is None


def test_a_service_that_cannot_read_its_key_says_so_and_never_listens(tmp_path: Path, papers: Papers) -> None:
    values = {"tls_certificate_file": papers.server.cert, "tls_key_file": tmp_path / "missing", "port": free_port()}
    with process_of([], values | {"bundles_dir": tmp_path}) as service:
        _, log = service.communicate(timeout=50)
    assert service.returncode == 1
    assert log.splitlines()[-1].startswith("cannot start: LREA_TLS_KEY_FILE: cannot read ")
    assert "Traceback" not in log
