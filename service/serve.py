"""One serving process: every part built from the settings and put together, and what runs it until a signal comes."""

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from types import FrameType
from typing import Any

import torch
import uvicorn
import uvloop
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.types import ASGIApp

from model.allocator import keep_freed_memory
from model.device import choose_device
from service.active import Placement, choose
from service.app import create_app
from service.batcher import Batcher
from service.connection import RESERVED, ConnectionLimits, connections
from service.errors import StartupError
from service.follow import ModelFollower
from service.health import Health
from service.listen import allow_connections
from service.metrics import Metrics
from service.place import GRACE_S
from service.prepare import Limits, ScoringJob
from service.scorer import Score, Scorer
from service.scoring import ScoringLimits
from service.settings import Settings
from service.store import Store
from service.tasks import await_or_end
from service.user_cache import UserCache
from service.user_lookup import Fetched, UserLookup


class Server(uvicorn.Server):
    """Uvicorn, but for `drain_s` after the first signal it serves on and only /readyz says that it is leaving."""

    def __init__(
        self, config: uvicorn.Config, *, follower: ModelFollower, metrics: Metrics, health: Health, drain_s: float
    ) -> None:
        super().__init__(config)
        self.follower = follower
        self.metrics = metrics
        self.health = health
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.health.draining or not self._drain_s or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self.health.draining = True
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, self._drain_s, super().handle_exit, sig, frame)


def run(main: Coroutine[Any, Any, None], torch_threads: int) -> None:
    """Run `main`, a serving process, to its end. torch_threads: 0 leaves the choice to torch.

    Raises StartupError, and KeyboardInterrupt when a signal comes before it serves.
    """
    if torch_threads:
        torch.set_num_threads(torch_threads)
    keep_freed_memory()
    # While a model is loaded there is nothing to finish: SIGTERM ends the process as SIGINT does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def serve_alone(settings: Settings) -> None:
    """Serve as the only process until a signal comes. Raises StartupError."""
    async with compose(settings, REGISTRY) as server:
        await serve_until_signal(server)


async def serve_until_signal(server: Server, listeners: Sequence[socket.socket] | None = None) -> None:
    """Serve on `listeners`, bound already, or on the address in the server's configuration."""
    # Uvicorn stops on SIGTERM and then raises it again for whoever handled it before: without this handler the
    # process would be ended there, before the parts are closed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # What is loaded now stays: without this the garbage collector looks at all of it whenever a large body has made
    # many objects, and everybody waits (100,000 rows: 260 ms; 130 ms with it).
    gc.collect()
    gc.freeze()
    # A request makes a few hundred objects and no cycles: the youngest generation's default of 700 was collected for
    # every other one.
    gc.set_threshold(20_000, 20, 20)
    await server.serve(None if listeners is None else list(listeners))


@asynccontextmanager
async def compose(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[Server]:
    """Every part, built from `settings` and put together, ready to serve; closed at the end. Raises StartupError."""
    allow_connections(settings.max_connections + RESERVED)
    async with AsyncExitStack() as stack:
        store = Store(settings.store_url, settings.key_prefix, settings.store_timeout_ms / 1e3)
        stack.push_async_callback(store.close)
        placement = Placement(_device(settings), getattr(torch, settings.dtype), settings.max_logit_error)
        # A signal that comes while the store is asked must end it, whatever redis-py awaits.
        model = await await_or_end(choose(store, settings.bundles_dir, settings.model_id, placement))
        # One thread each, so that a forward never waits until thousands of ids of later requests are looked up, nor
        # a request of usual size until a large body is read.
        parse_executor = stack.enter_context(ThreadPoolExecutor(1, "parse"))
        encode_executor = stack.enter_context(ThreadPoolExecutor(1, "encode"))
        compute_executor = stack.enter_context(ThreadPoolExecutor(1, "compute"))
        metrics, health = Metrics(registry), Health()
        user_cache = UserCache(settings.user_cache_mb << 20, settings.user_cache_max_age_s, metrics)
        scorer = Scorer(UserLookup(store, user_cache, metrics), store, compute_executor, metrics)
        follower = ModelFollower(
            model,
            store=store,
            bundles_dir=settings.bundles_dir,
            placement=placement,
            metrics=metrics,
            user_cache=user_cache,
            poll_s=settings.poll_seconds,
        )
        app = create_app(
            follower=follower,
            store=store,
            batcher=_batcher(settings, scorer),
            parse_executor=parse_executor,
            encode_executor=encode_executor,
            metrics=metrics,
            limits=_limits(settings),
            health=health,
        )
        yield Server(
            _uvicorn_config(settings, app, metrics),
            follower=follower,
            metrics=metrics,
            health=health,
            drain_s=settings.drain_seconds,
        )


def _device(settings: Settings) -> torch.device:
    try:
        return choose_device(settings.device)
    except ValueError as error:
        raise StartupError(f"LREA_DEVICE: {error}") from error


def _batcher(settings: Settings, scorer: Scorer) -> Batcher[ScoringJob, Fetched, Score]:
    return Batcher(scorer, max_works=settings.max_batch_requests, max_size=settings.max_batch_candidates)


def _uvicorn_config(settings: Settings, app: ASGIApp, metrics: Metrics) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connections(_connection_limits(settings), metrics),  # type: ignore[arg-type]  # any callable will do
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks where a request came from
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=GRACE_S,
    )


def _connection_limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        max_bodies_bytes=max(settings.max_bodies_mb << 20, settings.max_body_bytes),
        max_connections=settings.max_connections,
    )


def _limits(settings: Settings) -> ScoringLimits:
    return ScoringLimits(
        request=Limits(settings.max_candidates, settings.max_history),
        max_batch_requests=settings.max_batch_requests,
        max_body_bytes=settings.max_body_bytes,
        timeout_ms=settings.timeout_ms,
    )
