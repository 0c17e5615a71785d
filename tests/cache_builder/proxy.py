"""A proxy before a real store, which meddles when a chosen request comes by."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def proxy(store_url: str, marker: bytes, meddle: Callable[[], bool]) -> Iterator[str]:
    """The URL of a proxy before `store_url`.

    `meddle` is called when a request with `marker` has come by and before its answer does; if it returns True, the
    connection breaks instead of bringing the answer.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, store_url, marker, meddle), daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, store_url: str, marker: bytes, meddle: Callable[[], bool]) -> None:
    address = (urlsplit(store_url).hostname, urlsplit(store_url).port)
    with suppress(OSError):  # closed
        while True:
            client, _ = listener.accept()
            connection = _Connection(client, socket.create_connection(address), marker, meddle)
            threading.Thread(target=connection.pass_requests, daemon=True).start()
            threading.Thread(target=connection.pass_answers, daemon=True).start()


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, marker: bytes, meddle: Callable[[], bool]) -> None:
        self._client, self._server, self._marker, self._meddle = client, server, marker, meddle
        self._answers_wait = threading.Lock()
        self._broken = False

    def pass_requests(self) -> None:
        with suppress(OSError):  # either side may be gone at any time
            while request := self._client.recv(1 << 20):
                with self._answers_wait:
                    self._server.sendall(request)
                    if self._marker in request:
                        self._broken = self._meddle()
            self._server.shutdown(socket.SHUT_WR)

    def pass_answers(self) -> None:
        with self._client, self._server, suppress(OSError):
            while answer := self._server.recv(1 << 20):
                with self._answers_wait:
                    if self._broken:
                        break
                    self._client.sendall(answer)
            self._client.shutdown(socket.SHUT_RDWR)
