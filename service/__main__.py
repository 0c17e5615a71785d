"""`python -m service`: reads the settings, builds the parts, serves. The only file that reads the environment.

    LREA_STORE_URL=redis://cache:6379/0 LREA_BUNDLES_DIR=/bundles python -m service

Exits 0 after SIGTERM or SIGINT, and 1 with one message when there is nothing that it could serve.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from types import FrameType

import torch
import uvicorn
import uvloop
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry
from pydantic import ValidationError

from model.device import choose_device
from service.active import choose
from service.app import create_app
from service.batcher import Batcher
from service.errors import StartupError
from service.follow import ModelFollower
from service.health import Health
from service.metrics import Metrics
from service.prepare import Limits, ScoringJob
from service.scorer import Score, Scorer
from service.scoring import ScoringLimits
from service.settings import Settings, unknown_variables
from service.store import Store
from service.user_cache import UserCache
from service.user_lookup import Fetched, UserLookup

logger = logging.getLogger("service")


class Server(uvicorn.Server):
    """Uvicorn, but for `drain_s` after the first signal it serves on and only /readyz says that it is leaving."""

    def __init__(self, config: uvicorn.Config, health: Health, drain_s: float) -> None:
        super().__init__(config)
        self._health = health
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._health.draining or not self._drain_s or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self._health.draining = True
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, self._drain_s, super().handle_exit, sig, frame)


def main() -> int:
    """Serve until a signal comes. Returns the exit status."""
    try:
        settings = _read_settings()
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        for sentence in unknown_variables(os.environ):
            logger.warning("%s", sentence)
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        _check_address(settings.host, settings.port)
        # Uvicorn stops on SIGTERM and then raises it again for whoever handled it before: without this handler the
        # process would be killed there, before the parts are closed and with a status that is not 0.
        signal.signal(signal.SIGTERM, lambda *_: None)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except StartupError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _check_address(host: str, port: int) -> None:
    """Raise StartupError if nobody can listen there; asked before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port} ({error.strerror}): set LREA_HOST and LREA_PORT") from error


async def serve(settings: Settings) -> None:
    """Serve until a signal comes. Raises StartupError."""
    async with compose(settings, REGISTRY) as server:
        # What is loaded now stays: without this the garbage collector looks at all of it whenever a large body has
        # made many objects, and everybody waits (100,000 rows: 260 ms; 130 ms with it).
        gc.collect()
        gc.freeze()
        await server.serve()


@asynccontextmanager
async def compose(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[Server]:
    """Every part, built from `settings` and put together, ready to serve; closed at the end. Raises StartupError."""
    async with AsyncExitStack() as stack:
        store = Store(settings.store_url, settings.key_prefix, settings.store_timeout_ms / 1e3)
        stack.push_async_callback(store.close)
        model = await choose(store, settings.bundles_dir, settings.model_id, _device(settings))
        # One thread each, so that a forward never waits until thousands of ids of later requests are looked up, nor
        # a request of usual size until a large body is read.
        parse_executor = stack.enter_context(ThreadPoolExecutor(1, "parse"))
        encode_executor = stack.enter_context(ThreadPoolExecutor(1, "encode"))
        compute_executor = stack.enter_context(ThreadPoolExecutor(1, "compute"))
        metrics, health = Metrics(registry), Health()
        user_cache = UserCache(settings.user_cache_mb << 20, settings.user_cache_max_age_s, metrics)
        scorer = Scorer(UserLookup(store, user_cache, metrics), store, compute_executor, metrics)
        app = create_app(
            follower=ModelFollower(
                model,
                store=store,
                bundles_dir=settings.bundles_dir,
                metrics=metrics,
                user_cache=user_cache,
                poll_s=settings.poll_seconds,
            ),
            store=store,
            batcher=_batcher(settings, scorer),
            parse_executor=parse_executor,
            encode_executor=encode_executor,
            metrics=metrics,
            limits=_limits(settings),
            health=health,
        )
        yield Server(_uvicorn_config(settings, app), health, settings.drain_seconds)


def _read_settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        faults = [f"LREA_{str(fault['loc'][0]).upper()}: {fault['msg']}" for fault in error.errors(include_input=False)]
        raise StartupError("; ".join(faults)) from error


def _device(settings: Settings) -> torch.device:
    try:
        return choose_device(settings.device)
    except ValueError as error:
        raise StartupError(f"LREA_DEVICE: {error}") from error


def _batcher(settings: Settings, scorer: Scorer) -> Batcher[ScoringJob, Fetched, Score]:
    return Batcher(scorer, max_works=settings.max_batch_requests, max_size=settings.max_batch_candidates)


def _uvicorn_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=30,
    )


def _limits(settings: Settings) -> ScoringLimits:
    return ScoringLimits(
        request=Limits(settings.max_candidates, settings.max_history),
        max_batch_requests=settings.max_batch_requests,
        max_body_bytes=settings.max_body_bytes,
        timeout_ms=settings.timeout_ms,
    )


if __name__ == "__main__":
    sys.exit(main())
