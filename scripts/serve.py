"""Serve what `make demo` built: the embedded store and the scoring service, until Ctrl-C or SIGTERM.

    python scripts/serve.py [--demo .demo] [--store-port 6390] [--host 127.0.0.1] [--port 8000]

Ends with 0 when it is stopped, and with 1 when it could not start or the service ended by itself; a store that ends is
reported, and the service answers on without it. The two run in sessions of their own, so that a Ctrl-C reaches this
program alone, which stops the service before its store.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

START_S = 60.0  # the store answers within 100 ms; the service imports torch and warms up first
STOP_S = 20.0
TICK_S = 0.1


def main() -> int:
    """Read the arguments, serve, and say how it ended."""
    options = _options()
    bundles, store = options.demo / "bundles", options.demo / "store"
    if not bundles.is_dir() or not store.is_dir():
        return _fail(f"found no {bundles} and {store}: run `make demo` first")
    # Either signal unwinds through the `with` blocks below.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with ExitStack() as running:
            return _serve(running, options, bundles, store)
    except KeyboardInterrupt:
        return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path(".demo"), help="what `make demo` built (default: .demo)")
    parser.add_argument("--store-port", type=int, default=6390)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def _serve(running: ExitStack, options: argparse.Namespace, bundles: Path, store: Path) -> int:
    hosts = (("127.0.0.1", options.store_port, "--store-port"), (options.host, options.port, "--port"))
    for host, port, option in hosts:
        if _answers(host, port):
            return _fail(f"port {port} is taken: stop what listens there, or choose another with {option}")
    store_command = ["cache_builder", "store", "--dir", str(store), "--port", str(options.store_port)]
    store_process = running.enter_context(_program(store_command, {}))
    if not _wait(lambda: _answers("127.0.0.1", options.store_port), [store_process]):
        return _fail("the store did not start: its last line says why")
    settings = {
        "LREA_STORE_URL": f"redis://127.0.0.1:{options.store_port}/0",
        "LREA_BUNDLES_DIR": str(bundles),
        "LREA_HOST": options.host,
        "LREA_PORT": str(options.port),
    }
    service_process = running.enter_context(_program(["service"], settings))
    if not _wait(lambda: _answers(options.host, options.port), [store_process, service_process]):
        return _fail("the service did not start: its last line says why")
    print(f"serving on http://{options.host}:{options.port} (docs at /docs); Ctrl-C stops it", flush=True)
    store_missed = False
    while service_process.poll() is None:
        if store_process.poll() is not None and not store_missed:
            store_missed = True
            again = "python -m " + " ".join(store_command)
            print(
                f"serve: the store ended; the service answers on without it. Start it again: {again}", file=sys.stderr
            )
        time.sleep(TICK_S)
    return _fail("the service ended by itself: its last line says why")


@contextmanager
def _program(arguments: list[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """One of our programs, stopped by SIGTERM when the block ends, and killed if it does not listen."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], env={**os.environ, **settings}, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(ready: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> bool:
    """Whether `ready` came true in time, with every process still running."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if ready():
            return True
        time.sleep(TICK_S)
    return False


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # The first signal starts the way out; a second must not cut it short and leave a process behind.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(message: str) -> int:
    print(f"serve: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
