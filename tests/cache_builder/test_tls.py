"""TLS before a real server and a real cluster: who is trusted, who is refused, and what is said then."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cache_builder.connection import Connection
from cache_builder.errors import StoreError
from cache_builder.options import BuildOptions
from cache_builder.status import read_status
from cache_builder.store import Store
from tests.building import build_here
from tests.cache_builder.cluster import running_cluster
from tests.cache_builder.conftest import Meddler, World, administrate
from tests.cache_builder.tls import Pair, make_pair, tls_before
from tests.conftest import free_port


@dataclass(frozen=True)
class Papers:
    """Who has signed what."""

    authority: Pair
    server: Pair
    client: Pair
    elsewhere: Pair  # of the same authority, for another host
    stranger: Pair  # an authority that nobody knows
    locked: Path  # the client's key, with a passphrase


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    authority = make_pair(folder, "authority")
    client, locked = make_pair(folder, "client", authority), folder / "locked.key"
    lock = ["openssl", "ec", "-in", str(client.key), "-out", str(locked), "-aes128", "-passout", "pass:secret"]
    subprocess.run(lock, check=True, capture_output=True)
    return Papers(
        authority,
        make_pair(folder, "server", authority, "IP:127.0.0.1"),
        client,
        make_pair(folder, "elsewhere", authority, "DNS:elsewhere.example"),
        make_pair(folder, "stranger"),
        locked,
    )


@pytest.fixture
def server_port(store_url: str) -> int:
    port = urlsplit(store_url).port
    assert port is not None
    return port


@pytest.fixture
def url(server_port: int, papers: Papers) -> Iterator[str]:
    """The shared server over TLS; it asks for no certificate."""
    with tls_before(server_port, papers.server) as port:
        yield f"rediss://127.0.0.1:{port}/0"


def refusal(url: str, connection: Connection) -> str:
    with Store(url, 2, connection) as store, pytest.raises(StoreError) as failure:
        store.ping()
    return str(failure.value)


def test_a_store_over_tls(url: str, store_url: str, papers: Papers, key_prefix: str) -> None:
    with Store(url, connection=Connection(ca_file=papers.authority.cert)) as store, Store(store_url) as plain:
        store.set_many([(f"{key_prefix}:a", b"x" * 3_000_000)])
        assert plain.get(f"{key_prefix}:a") == store.get(f"{key_prefix}:a") == b"x" * 3_000_000
        assert store.server_ids() == plain.server_ids()


@pytest.mark.parametrize("trusted", [None, "stranger"])
def test_an_authority_that_is_not_trusted(url: str, papers: Papers, trusted: str | None) -> None:
    said = refusal(url, Connection(ca_file=papers.stranger.cert if trusted else None))
    assert "certificate verify failed" in said


def test_a_certificate_for_another_host(server_port: int, papers: Papers) -> None:
    with tls_before(server_port, papers.elsewhere) as port:
        said = refusal(f"rediss://127.0.0.1:{port}", Connection(ca_file=papers.authority.cert))
    assert "IP address mismatch" in said


def test_a_store_that_asks_for_our_certificate(server_port: int, papers: Papers) -> None:
    authority, client, stranger = papers.authority.cert, papers.client, papers.stranger
    with tls_before(server_port, papers.server, papers.authority) as port:
        url = f"rediss://127.0.0.1:{port}"
        with Store(url, connection=Connection(ca_file=authority, cert_file=client.cert, key_file=client.key)) as store:
            store.ping()
        for pair in (None, stranger):
            shown = (pair.cert, pair.key) if pair else (None, None)
            said = refusal(url, Connection(None, None, None, authority, *shown))
            assert said.startswith(f"store {url} did not answer: ConnectionError")


def test_a_key_that_is_not_the_certificate_s_or_has_a_passphrase(url: str, papers: Papers) -> None:
    for key in (papers.stranger.key, papers.locked):
        said = refusal(url, Connection(None, None, None, papers.authority.cert, papers.client.cert, key))
        assert f"store {url} did not answer" in said


def test_a_file_that_is_no_certificate(url: str, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    assert f"store {url} did not answer" in refusal(url, Connection(ca_file=tmp_path / "ca.pem"))


def test_a_cluster_over_tls(world: World, papers: Papers, tmp_path: Path, key_prefix: str, meddler: Meddler) -> None:
    """Each node announces the port of the TLS server before it."""
    ca = Connection(ca_file=papers.authority.cert)
    with running_cluster(tmp_path) as nodes, ExitStack() as stack:
        ports = []
        for server in nodes:
            ports.append(stack.enter_context(tls_before(server.port, papers.server, port=free_port())))
            admin = stack.enter_context(administrate(server))
            admin.config_set("cluster-announce-port", ports[-1])
        while {node[1] for slots in admin.execute_command("CLUSTER SLOTS") for node in slots[2:]} != set(ports):
            time.sleep(0.05)
        url = f"rediss+cluster://127.0.0.1:{ports[2]}"
        with Store(url, connection=ca) as store:
            summary = build_here(world.bundle, world.data, store, BuildOptions(key_prefix, batch_users=7), meddler)
            found = read_status(store, key_prefix)
            assert found.current is not None
            assert (found.current.generation, found.current.users) == (summary.generation, summary.users)
        with pytest.raises(StoreError, match=r"did not open: .*certificate verify failed"):
            Store(url)
