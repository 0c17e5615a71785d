"""One serving process: every part built from the settings and put together, and what runs it until a signal comes."""

import asyncio
import gc
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import torch
import uvicorn
import uvloop
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.types import ASGIApp

from model.allocator import keep_freed_memory
from model.device import choose_device
from service.access.key_ring import KeyRing
from service.access.tls import server_context
from service.active import Placement, choose
from service.app import create_app
from service.batching.backlog import Backlog
from service.batching.batcher import Batcher
from service.batching.compute_thread import ComputeThread
from service.batching.prepare import Limits, ScoringJob
from service.batching.scorer import Score, Scorer
from service.errors import StartupError
from service.http.body_memory import BodyMemory
from service.http.connection import ConnectionLimits, connections
from service.http.handshake import over_tls
from service.http.scoring import ScoringLimits
from service.http.seats import RESERVED, Seats
from service.metrics import Metrics
from service.process.last_resort import end_within
from service.process.listen import allow_connections
from service.process.server import Server
from service.publication.follow import ModelFollower
from service.publication.health import Health
from service.settings import Settings
from service.store.breaker import Breaker
from service.store.reads import Store
from service.tally import Tally
from service.tasks import await_or_end
from service.users.cache import UserCache
from service.users.lookup import Fetched, UserLookup

SWITCH_INTERVAL_S = 0.0002


def run(main: Coroutine[Any, Any, None], torch_threads: int) -> None:
    """Run `main`, a serving process, to its end. torch_threads: 0 leaves the choice to torch.

    Raises StartupError, and KeyboardInterrupt when a signal comes before it serves.
    """
    if torch_threads:
        torch.set_num_threads(torch_threads)
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _leave)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def _leave(*_: object) -> None:
    """While a model is loaded there is nothing to finish: SIGTERM ends the process as SIGINT does.

    asyncio's runner has the first one cancel the main task, which hears it at once: it loads on another thread.
    """
    end_within(0)
    signal.raise_signal(signal.SIGINT)


async def serve_alone(settings: Settings) -> None:
    """Serve as the only process until a signal comes. Raises StartupError."""
    async with compose(settings, REGISTRY) as server:
        await serve_until_signal(server)


async def serve_until_signal(server: Server, listeners: Sequence[socket.socket] | None = None) -> None:
    """Serve on `listeners`, bound already, or on the address in the server's configuration."""
    # From here on, and not from when uvicorn takes the signals: one in between was lost, and a worker served on until
    # it was killed. Uvicorn raises the signal again when it has stopped, and the parts are still to be closed then.
    signal.signal(signal.SIGTERM, server.handle_exit)
    # What is loaded now stays: without this the garbage collector looks at all of it whenever a large body has made
    # many objects, and everybody waits (100,000 rows: 260 ms; 130 ms with it).
    gc.collect()
    gc.freeze()
    # A request makes a few hundred objects and no cycles: the youngest generation's default of 700 was collected for
    # every other one.
    gc.set_threshold(20_000, 20, 20)
    # A thread that reads a large body holds the interpreter for so long at a time, and a forward asks for it after each
    # of its steps: with the default of 5 ms, one caller with 100,000 rows after another made everybody wait 80 ms.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    await server.serve(None if listeners is None else list(listeners))


@asynccontextmanager
async def compose(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[Server]:
    """Every part, built from `settings` and put together, ready to serve; closed at the end. Raises StartupError."""
    most_connections = allow_connections(settings.max_connections, RESERVED)
    async with AsyncExitStack() as stack:
        # Before the minutes that a large model takes: who may ask, and how.
        tls = server_context(settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
        metrics, health = Metrics(registry), Health()
        tally = Tally(metrics)
        stack.callback(tally.settle)  # of several workers the counts outlive this one
        keys = _keys(settings, metrics)
        store = _store(settings, metrics)
        stack.push_async_callback(store.close)
        placement = Placement(_device(settings), getattr(torch, settings.dtype), settings.max_logit_error)
        # One thread each, so that a forward never waits until thousands of ids of later requests are looked up, nor
        # a request of usual size until a large body is read.
        parse_executor = stack.enter_context(ThreadPoolExecutor(1, "parse"))
        encode_executor = stack.enter_context(ThreadPoolExecutor(1, "encode"))
        compute_thread = stack.enter_context(ComputeThread(asyncio.get_running_loop()))
        user_cache = UserCache(settings.user_cache_mb << 20, settings.user_cache_max_age_s, metrics)
        backlog = Backlog(settings.max_waiting_candidates, settings.max_batch_candidates)
        tally.show(partial(backlog.show, metrics))
        scorer = Scorer(UserLookup(store, user_cache, metrics), store, backlog, compute_thread, tally)
        follower = ModelFollower(
            # A signal that comes while the store is asked must end it, whatever redis-py awaits. Not in a variable:
            # this frame lives as long as the process, and so would the first model.
            await await_or_end(choose(store, settings.bundles_dir, settings.model_id, placement)),
            store=store,
            compute_thread=compute_thread,
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
            backlog=backlog,
            body_memory=BodyMemory(max(settings.max_bodies_mb << 20, settings.max_body_bytes)),
            parse_executor=parse_executor,
            encode_executor=encode_executor,
            metrics=metrics,
            tally=tally,
            limits=_limits(settings),
            health=health,
            keys=keys,
        )
        yield Server(
            _uvicorn_config(settings, app, _protocol(_connection_limits(settings, most_connections), tally, tls)),
            scheme="http" if tls is None else "https",
            follower=follower,
            metrics=metrics,
            health=health,
            drain_s=settings.drain_seconds,
        )


def _store(settings: Settings, metrics: Metrics) -> Store:
    breaker = Breaker(settings.store_breaker_failures, settings.store_breaker_open_ms / 1e3, show=metrics.show_breaker)
    return Store(settings.store_url, settings.key_prefix, settings.store_timeout_ms / 1e3, breaker)


def _device(settings: Settings) -> torch.device:
    try:
        return choose_device(settings.device)
    except ValueError as error:
        raise StartupError(f"LREA_DEVICE: {error}") from error


def _batcher(settings: Settings, scorer: Scorer) -> Batcher[ScoringJob, Fetched, Score]:
    return Batcher(scorer, max_works=settings.max_batch_requests)


def _keys(settings: Settings, metrics: Metrics) -> KeyRing | None:
    if not settings.asks_for_keys:
        return None
    variable = settings.api_keys
    return KeyRing(settings.api_keys_file, None if variable is None else variable.get_secret_value(), metrics)


def _protocol(limits: ConnectionLimits, tally: Tally, tls: ssl.SSLContext | None) -> Callable[..., Any]:
    """What each connection is made with."""
    seats = Seats(limits.max_connections)
    plain = connections(limits, seats, tally)
    return plain if tls is None else over_tls(plain, tls, limits, seats, tally)


def _uvicorn_config(settings: Settings, app: ASGIApp, protocol: Callable[..., Any]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,  # type: ignore[arg-type]  # any callable will do
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks where a request came from
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


def _connection_limits(settings: Settings, most_connections: int) -> ConnectionLimits:
    return ConnectionLimits(
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        max_connections=most_connections,
    )


def _limits(settings: Settings) -> ScoringLimits:
    return ScoringLimits(
        request=Limits(settings.max_candidates, settings.max_history),
        max_batch_requests=settings.max_batch_requests,
        max_body_bytes=settings.max_body_bytes,
        patience_s=settings.timeout_ms / 1e3,
    )
