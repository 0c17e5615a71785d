"""A real service on a free port: the composition root of `python -m service`, on a thread of the test's process."""

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvloop
from prometheus_client import CollectorRegistry

from service.process.serve import compose
from service.process.server import Server
from service.settings import Settings
from tests.conftest import free_port


@contextmanager
def running_service(verify: Any = True, **values: Any) -> Iterator[httpx.Client]:
    """Serve with these settings and give a client of it, once it is ready. Raises what the service's start raises.

    verify: of the client (httpx), where the service has a certificate: an ssl.SSLContext that trusts it.
    """
    # The tests' machine may be busy: the default of 50 ms would take its hiccups for a store that does not answer.
    chosen: Any = {"port": free_port(), "device": "cpu", "store_timeout_ms": 2000, "timeout_ms": 20_000} | values
    settings = Settings(**chosen)
    service = _ServiceThread(settings)
    service.start()
    try:
        scheme = "http" if settings.tls_certificate_file is None else "https"
        url = f"{scheme}://127.0.0.1:{settings.port}"
        with httpx.Client(base_url=url, timeout=30, verify=verify) as client:
            service.wait_until_ready(client)
            yield client
    finally:
        service.stop()


class _ServiceThread(threading.Thread):
    def __init__(self, settings: Settings) -> None:
        super().__init__(name="service", daemon=True)
        self._settings = settings
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with compose(self._settings, CollectorRegistry()) as self._server:
            await self._server.serve()

    def wait_until_ready(self, client: httpx.Client) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self._error is not None:
                raise self._error
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError("the service was not ready within 20 s")

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self.join(timeout=20)
        assert not self.is_alive(), f"the service did not stop:\n{self._what_runs()}"

    def _what_runs(self) -> str:
        """Where each task waits, for whoever has to find out why."""
        text = io.StringIO()
        for task in asyncio.all_tasks(self._loop):
            task.print_stack(file=text)
        return text.getvalue()
