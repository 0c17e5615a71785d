"""The faulty network: each fault does to real connections what its name says, is counted, and ends when told to."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from loadtest.chaos.proxy import HOST, PASS, Fault, Proxy
from tests.conftest import free_port

REPLY = bytes(range(256)) * 16


@pytest.fixture
def store_port() -> Iterator[int]:
    """A server that answers every request of one byte with REPLY."""
    with socket.create_server((HOST, 0)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket) -> None:
    def answer(connection: socket.socket) -> None:
        with closing(connection):
            try:
                while connection.recv(1):
                    connection.sendall(REPLY)
            except OSError:
                pass

    try:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()
    except OSError:
        pass


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=10)


def ask(connection: socket.socket) -> bytes:
    """The whole reply. Raises ConnectionResetError with what had arrived."""
    connection.sendall(b"?")
    return receive(connection)


def receive(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < len(REPLY):
        try:
            more = connection.recv(1 << 16)
        except ConnectionResetError:
            raise ConnectionResetError(data) from None
        assert more, f"closed after {len(data)} bytes"
        data += more
    return data


def test_without_a_fault_it_only_forwards(store_port: int) -> None:
    with Proxy(store_port) as proxy, connect(proxy) as one, connect(proxy) as other:
        assert [ask(connection) for connection in (one, other, one)] == [REPLY] * 3
        counts = proxy.counts()
    assert (counts.connections, counts.cut, counts.reset, counts.delayed, counts.held) == (2, 0, 0, 0, 0)
    assert counts.chunks >= 3


def test_a_cut_resets_every_connection_and_no_later_one(store_port: int) -> None:
    with Proxy(store_port) as proxy:
        with connect(proxy) as one, connect(proxy) as other:
            assert ask(one) == ask(other) == REPLY
            assert proxy.cut() == 2
            for connection in (one, other):
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
        with connect(proxy) as later:
            assert ask(later) == REPLY
        assert proxy.counts().cut == 2


def test_replies_are_delayed_for_as_long_as_it_is_told(store_port: int) -> None:
    with Proxy(store_port) as proxy, connect(proxy) as connection:
        proxy.set(Fault(delay_s=0.3))
        started = time.monotonic()
        assert ask(connection) == REPLY
        assert time.monotonic() - started >= 0.3
        proxy.set(PASS)
        delayed = proxy.counts().delayed
        assert ask(connection) == REPLY
        assert proxy.counts().delayed == delayed >= 1


@pytest.mark.parametrize("after", [0, 1, 100, len(REPLY) - 1])
def test_a_reply_is_reset_before_it_is_whole(store_port: int, after: int) -> None:
    with Proxy(store_port) as proxy:
        proxy.set(Fault(reset_after=after))
        with connect(proxy) as connection, pytest.raises(ConnectionResetError) as error:
            ask(connection)
        assert error.value.args[0] == REPLY[: len(error.value.args[0])]
        assert len(error.value.args[0]) <= after
        proxy.set(PASS)
        with connect(proxy) as connection:
            assert ask(connection) == REPLY
        assert proxy.counts().reset == 1


def test_a_short_reply_is_not_reset(store_port: int) -> None:
    """Else no connection would get past its handshake, and no record would ever be cut in two."""
    with Proxy(store_port) as proxy, connect(proxy) as connection:
        proxy.set(Fault(reset_after=len(REPLY)))
        assert ask(connection) == ask(connection) == REPLY
        assert proxy.counts().reset == 0


def test_what_is_held_passes_afterwards(store_port: int) -> None:
    with Proxy(store_port) as proxy, connect(proxy) as connection:
        assert ask(connection) == REPLY
        proxy.set(Fault(hold=True))
        connection.sendall(b"?")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        proxy.set(PASS)
        assert receive(connection) == REPLY
        assert proxy.counts().held == 1


def test_nothing_behind_it_is_a_connection_that_is_reset() -> None:
    with Proxy(free_port()) as proxy:
        with pytest.raises(ConnectionResetError), connect(proxy) as connection:  # perhaps while it connects
            connection.recv(1)
        assert proxy.counts().refused == 1


def test_it_ends_with_connections_that_are_held(store_port: int) -> None:
    with Proxy(store_port) as proxy, connect(proxy) as connection:
        proxy.set(Fault(hold=True))
        connection.sendall(b"?")
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
