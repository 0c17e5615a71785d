"""`python -m service`: reads the settings and serves, alone or with workers. The only file that reads the environment.

    LREA_STORE_URL=redis://cache:6379/0 LREA_BUNDLES_DIR=/bundles python -m service [--workers N]

Exits 0 after SIGTERM or SIGINT, and 1 with one message when there is nothing that it could serve.
"""

import logging
import os
import sys
import threading
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from service.errors import StartupError
from service.process.last_resort import SPARE_S
from service.process.listen import bind, check_address, is_loopback
from service.process.place import Place
from service.process.supervisor import supervise
from service.settings import Settings, unknown_variables

logger = logging.getLogger("service")
command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command.command()
def main(
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the port. Goes before LREA_WORKERS, which is 1 by default.")
    ] = None,
    as_worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Answer candidate lists over HTTP until SIGTERM or SIGINT.

    All else is set by environment variables, from LREA_STORE_URL, LREA_BUNDLES_DIR, LREA_HOST and LREA_PORT on:
    docs/service.md lists them.
    """
    try:
        status = _run(_read_settings(workers), None if as_worker is None else Place.from_argument(as_worker))
    except StartupError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 0
    _leave(status)


def _run(settings: Settings, place: Place | None) -> int:
    """Returns the exit status. Torch is imported by processes that serve, not by one that only looks after them."""
    _log(settings.log_level, "" if place is None else f"worker {place.number} ")
    if place is not None:
        from service.process.worker import run_worker  # noqa: PLC0415  slow to import

        return run_worker(settings, place)
    for sentence in unknown_variables(os.environ):
        logger.warning("%s", sentence)
    if not settings.asks_for_keys and not is_loopback(settings.host):
        logger.warning(
            "no API keys are set: whoever reaches %s port %d may ask all of this service. "
            "Set LREA_API_KEYS_FILE or LREA_API_KEYS, or let only what asks for keys itself reach it",
            settings.host,
            settings.port,
        )
    if settings.workers > 1:
        return _supervise(settings)
    from service.process.serve import run, serve_alone  # noqa: PLC0415  slow to import

    check_address(settings.host, settings.port)
    run(serve_alone(settings), settings.torch_threads)
    return 0


def _supervise(settings: Settings) -> int:
    listeners = bind(settings.host, settings.port)
    for listener in listeners:
        logger.info("%d workers will serve on %s port %d", settings.workers, *listener.getsockname()[:2])
    # This very command line, up to its own options: the same interpreter with the same flags.
    this_program = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]
    return supervise(
        settings.workers,
        listeners,
        [*this_program, "--as-worker"],
        os.environ,
        stop_s=settings.drain_seconds + settings.grace_seconds + SPARE_S + 5,  # first let it say what is stuck
    )


def _leave(status: int) -> NoReturn:
    """End this process, everything of which is closed, whatever daemon threads still do.

    Python waits for none of them, but as it leaves it takes the interpreter away from one that loads a bundle, in the
    midst of torch's C++: that ended in SIGABRT 12 times of 12.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)


def _log(level: str, who: str) -> None:
    logging.basicConfig(level=level.upper(), format=f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s")


def _read_settings(workers: int | None) -> Settings:
    try:
        return Settings() if workers is None else Settings(workers=workers)
    except ValidationError as error:
        faults = [f"LREA_{str(fault['loc'][0]).upper()}: {fault['msg']}" for fault in error.errors(include_input=False)]
        raise StartupError("; ".join(faults)) from error


if __name__ == "__main__":
    command()
