"""One of several serving processes: how it differs from one that serves alone.

It listens on sockets that its parent bound, and only once its model is warm, so that no caller meets a cold one; counts
into files that all workers share; tells the parent every second that its event loop turns; ends when a part of it has
died, for its parent starts another; and ends when its parent has.
"""

import asyncio
import os
import shutil
import signal
import socket
import threading

import torch

from service.errors import PublicationError, StartupError
from service.process.last_resort import end_within
from service.process.place import BEAT_S, Place
from service.process.serve import compose, run, serve_until_signal
from service.process.server import Server
from service.settings import Settings
from service.shared_metrics import SharedRegistry
from service.tasks import end_tasks


def run_worker(settings: Settings, place: Place) -> int:
    """Serve at `place` until a signal comes, or the parent ends. Returns the exit status."""
    lifeline = _Lifeline(place.lifeline, settings.grace_seconds)
    lifeline.start()
    try:
        threads = forward_threads(settings.torch_threads, torch.get_num_threads(), place.workers)
        run(_serve(settings, place), threads)
    except (StartupError, PublicationError) as error:
        place.refuse(str(error))
        return 1
    except _PartDied:
        return 1
    finally:
        if lifeline.cut:
            shutil.rmtree(place.folder, ignore_errors=True)  # nobody else is left to do it
    return 0


def forward_threads(setting: int, torchs_choice: int, workers: int) -> int:
    """CPU threads of one worker's forward: what is set, else its part of what torch takes for a process alone."""
    return setting or max(1, torchs_choice // workers)


class _PartDied(Exception):
    """What /livez says 503 for. No probe could be relied on to see it: another worker may answer."""


class _Lifeline(threading.Thread):
    """Ends this process when the parent has: a pipe, for the kernel closes the other end however the parent ended.

    (Linux' death signal goes by the thread that started the process, not by the parent, and other systems have none.)
    """

    def __init__(self, file: int, grace_s: float) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.cut = False
        self._file = file
        self._grace_s = grace_s

    def run(self) -> None:
        os.read(self._file, 1)
        self.cut = True
        end_within(self._grace_s)
        os.kill(os.getpid(), signal.SIGINT)


async def _serve(settings: Settings, place: Place) -> None:
    async with compose(settings, SharedRegistry(place.folder, place.number)) as server:
        if place.replaces:
            server.metrics.worker_restarts.inc()
        await server.follower.warm_up()
        beating = asyncio.create_task(_beat(server, place, settings.grace_seconds), name="heartbeat")
        try:
            await serve_until_signal(server, [socket.socket(fileno=file) for file in place.listeners])
        finally:
            await end_tasks([beating])
        if server.health.dead:
            raise _PartDied


async def _beat(server: Server, place: Place, grace_s: float) -> None:
    """From the event loop: a process whose loop stands still accepts nothing, and its neighbours answer the probes."""
    while True:
        if server.started:
            place.beat()
        if server.health.dead and not server.should_exit:
            end_within(grace_s)
            server.should_exit = True
        await asyncio.sleep(BEAT_S if server.started else BEAT_S / 20)
