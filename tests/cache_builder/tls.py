"""Certificates of a day, and a TLS server before a real store: the Valkey of the tests is built without TLS."""

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM."""

    cert: Path
    key: Path


def make_pair(folder: Path, name: str, signed_by: Pair | None = None, hosts: str = "") -> Pair:
    """hosts: as in `IP:127.0.0.1,DNS:localhost`; signed_by: None makes an authority."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", f"/CN={name}", "-out", str(pair.cert), "-keyout", str(pair.key)]
    if signed_by:
        command += ["-CA", str(signed_by.cert), "-CAkey", str(signed_by.key)]
    if hosts:
        command += ["-addext", f"subjectAltName={hosts}"]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@contextmanager
def tls_before(server_port: int, own: Pair, clients_of: Pair | None = None, port: int = 0) -> Iterator[int]:
    """The port of a TLS server on loopback that passes everything on to `server_port`.

    clients_of: the authority that must have signed a client's certificate; None: clients need none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.cert, own.key)
    if clients_of:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients_of.cert)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer.transport):
            back, forth = await asyncio.open_connection("127.0.0.1", server_port)
            with closing(forth.transport):
                await asyncio.gather(_pass(reader, forth), _pass(back, writer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(serve, "127.0.0.1", port, ssl=context), loop
    ).result()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # either side may be gone at any time
        while data := await reader.read(1 << 20):
            writer.write(data)
            await writer.drain()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    own = asyncio.current_task()
    connections = [task for task in asyncio.all_tasks() if task is not own]
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await asyncio.sleep(0)  # what was closed just now is released in the loop's next round
