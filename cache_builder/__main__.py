"""The builder's commands; with store_options.py the only place that reads its environment.

    python -m cache_builder build  --bundle DIR --data DIR --store URL [--as-of T]
    python -m cache_builder refresh --bundle DIR --data DIR --store URL [--as-of T]
    python -m cache_builder verify --bundle DIR --data DIR --store URL
    python -m cache_builder publish --store URL [--generation G]
    python -m cache_builder rollback --store URL [--generation G]
    python -m cache_builder gc --store URL [--now] [--held]
    python -m cache_builder status --store URL
    python -m cache_builder store  --dir DIR --port P

Each ends with one line of JSON on stdout and exit code 0, or with one message on stderr and exit code 1 (130 after
Ctrl-C or SIGTERM). A store is redis://, redis+cluster://, either of them over TLS, unix:// or embedded:FOLDER.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from cache_builder.build import build
from cache_builder.collect import collect
from cache_builder.embedded import serve_folder
from cache_builder.errors import BuilderError, InputError
from cache_builder.gate import GateOptions
from cache_builder.job_metrics import reporting
from cache_builder.options import BuildOptions
from cache_builder.publish_held import publish_held
from cache_builder.rollback import roll_back
from cache_builder.source import open_source
from cache_builder.status import read_status
from cache_builder.store import Store
from cache_builder.store_options import StoreOptions, with_store
from cache_builder.verify import check_against_data, read_published
from cache_builder.workers import Processes, ThisProcess, Workers
from model.allocator import keep_freed_memory
from model.bundle import Bundle, load_bundle
from model.cache_format import PRECISIONS, Precision, check_prefix
from model.device import choose_device
from model.progress import Reporter, stderr_reporter

if TYPE_CHECKING:
    from cache_builder.ray_workers import RayWorkers

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
WATCH_EVERY_S = 1.0
PARALLEL_ROWS = 20_000_000  # fewer are done before a second process has loaded the model

BundleDir = Annotated[Path, typer.Option("--bundle", help="folder of the trained model")]
Data = Annotated[str, typer.Option("--data", help="data folder; or Parquet file, folder, glob or URL of interactions")]
KeyPrefix = Annotated[str, typer.Option(envvar="LREA_KEY_PREFIX", help="what every key begins with")]
Device = Annotated[str, typer.Option(envvar="LREA_DEVICE", help="auto, cpu or cuda")]
BatchUsers = Annotated[int, typer.Option(min=1, help="users compressed at a time")]
CountRecords = Annotated[bool, typer.Option(help="first look whether all its records are there")]
MinCoverage = Annotated[float, typer.Option(min=0, help="users, as a part of the published generation's")]
AsOf = Annotated[int | None, typer.Option(help="use behaviours before this timestamp only")]

app = typer.Typer(
    help="Compress every user's history into the store.", add_completion=False, pretty_exceptions_enable=False
)


def _build(
    refresh: bool,
    bundle: BundleDir,
    data: Data,
    store: StoreOptions,
    as_of: AsOf = None,
    precision: Annotated[str, typer.Option(help=f"of the pair: {', '.join(PRECISIONS)}")] = "float16",
    batch_users: BatchUsers = 256,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; default: one per core where the data is large, on CUDA 1")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray (extra ray): processes here, or actors on a Ray cluster")
    ] = "local",
    shard_rows: Annotated[int, typer.Option(min=1, help="rows of a shard, the unit of work, about")] = 1_000_000,
    work: Annotated[
        Path, typer.Option(envvar="LREA_WORK_DIR", help="folder for shards, ledgers and quarantine")
    ] = Path(".lrea-build"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with what a stopped build left in --work")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="do not publish: `publish` does, later")] = False,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="of the rows, that cannot be used")] = 0.001,
    max_write_mb_s: Annotated[float | None, typer.Option(help="MB of records a second, to spare the readers")] = None,
    min_coverage: MinCoverage = 0.9,
    max_unknown: Annotated[float, typer.Option(min=0, help="of the behaviours, items the model does not know")] = 0.5,
    max_memory: Annotated[float, typer.Option(min=0, help="of the store's maxmemory, with all records in it")] = 0.95,
    max_norm_drift: Annotated[float, typer.Option(min=0, help="of the pairs' mean norm, same users and model")] = 0.5,
    max_score_drift: Annotated[float, typer.Option(min=0, help="mean change of a probability")] = 0.2,
    metrics_file: Annotated[Path | None, typer.Option(help="textfile for a Prometheus node exporter (.prom)")] = None,
    previous_bundle: Annotated[
        Path | None, typer.Option(help="of the published model, for its scores; default: beside --bundle")
    ] = None,
    key_prefix: KeyPrefix = "lrea",
    device: Device = "auto",
) -> None:
    with _outcome() as reporter, reporting(metrics_file, key_prefix) as done:
        gate = GateOptions(min_coverage, max_unknown, max_memory, max_norm_drift, max_score_drift)
        if max_write_mb_s is not None and not 0 < max_write_mb_s < float("inf"):
            raise InputError(f"--max-write-mb-s is {max_write_mb_s:g}: wanted more than 0, or leave it out")
        options = BuildOptions(
            check_prefix(key_prefix), as_of, _precision(precision), batch_users, max_write_mb_s,
            gate=gate, work=work, resume=resume, shard_rows=shard_rows, max_bad_fraction=max_bad_fraction,
            refresh=refresh, hold=hold,
        )  # fmt: skip
        model = load_bundle(bundle, choose_device(device))
        rows = open_source(data).rows
        with store.open() as opened, _workers(engine, workers, rows, bundle, model, opened) as found:
            done.append(build(model, data, opened, found, options, reporter, _finder(bundle, previous_bundle)))
    _print_json(done[0].as_dict())


app.command("build", help="Write a new generation, verify it, and only then publish it.")(
    with_store(_build, refresh=False)
)
app.command("refresh", help="As build, but copy the records of users about whom nothing has changed.")(
    with_store(_build, refresh=True)
)


@app.command("verify")
@with_store
def verify_command(
    bundle: BundleDir,
    data: Data,
    store: StoreOptions,
    as_of: AsOf = None,
    batch_users: BatchUsers = 256,
    key_prefix: KeyPrefix = "lrea",
    device: Device = "auto",
) -> None:
    """Compress the data anew and compare every published record with it."""
    with _outcome() as reporter:
        prefix = check_prefix(key_prefix)
        model, source = load_bundle(bundle, choose_device(device)), open_source(data)
        with store.open(create=False) as opened:
            manifest = read_published(opened, prefix, model.model_id, as_of)
            users = check_against_data(opened, prefix, model, source, manifest, batch_users, reporter)
    _print_json({"model_id": model.model_id, "generation": manifest.generation, "users": users, "verified": True})


@app.command("publish")
@with_store
def publish_command(
    store: StoreOptions,
    generation: Annotated[str | None, typer.Option(help="held, by name; default: the only one")] = None,
    count: CountRecords = True,
    min_coverage: MinCoverage = 0.9,
    key_prefix: KeyPrefix = "lrea",
) -> None:
    """Publish what `build --hold` has written and verified."""
    with _outcome() as reporter, store.open(create=False) as opened:
        gate = GateOptions(min_coverage=min_coverage)
        pointer = publish_held(opened, check_prefix(key_prefix), generation, count, gate, reporter)
    _print_json(orjson.loads(pointer.to_json()))


@app.command("gc")
@with_store
def gc_command(
    store: StoreOptions,
    now: Annotated[bool, typer.Option("--now", help="delete what was left behind at once, not in 12 hours")] = False,
    held: Annotated[bool, typer.Option("--held", help="delete what waits for `publish` too")] = False,
    key_prefix: KeyPrefix = "lrea",
) -> None:
    """Free the memory of generations that nobody needs."""
    with _outcome() as reporter, store.open(create=False) as opened:
        found = collect(opened, check_prefix(key_prefix), now=now, held=held, reporter=reporter)
    _print_json(found.as_dict())


@app.command("rollback")
@with_store
def rollback_command(
    store: StoreOptions,
    generation: Annotated[str | None, typer.Option(help="current or previous; default: the one before")] = None,
    count: CountRecords = True,
    key_prefix: KeyPrefix = "lrea",
) -> None:
    """Publish the generation before the current one again; nothing is deleted."""
    with _outcome() as reporter, store.open(create=False) as opened:
        pointer = roll_back(opened, check_prefix(key_prefix), generation, count, reporter)
    _print_json(orjson.loads(pointer.to_json()))


@app.command("status")
@with_store
def status_command(store: StoreOptions, key_prefix: KeyPrefix = "lrea") -> None:
    """What is published, what it holds, and who is building."""
    with _outcome() as reporter, store.open(create=False) as opened:
        found = read_status(opened, check_prefix(key_prefix))
        for line in found.lines():
            reporter.note(line)
    _print_json(found.as_dict())


@app.command("store")
def store_command(
    folder: Annotated[Path, typer.Option("--dir", help="where its data is kept")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="on 127.0.0.1; a free one if not given")] = None,
) -> None:
    """Run an embedded store in the foreground until Ctrl-C or SIGTERM; then save its data."""
    with _outcome() as reporter, serve_folder(folder, port) as url:
        try:
            reporter.note(f"store on {url}, data in {folder}: Ctrl-C saves and stops it")
            _watch(url)
        except KeyboardInterrupt:
            pass
    _print_json({"store": url, "saved": True})


@contextmanager
def _outcome() -> Iterator[Reporter]:
    """A reporter for the job inside; an understood failure becomes one message and an exit code."""
    reporter = stderr_reporter()
    before = signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop is a person's Ctrl-C
    try:
        yield reporter
    except (BuilderError, ValueError, OSError) as error:  # ValueError: a bundle, data or a pointer that cannot be read
        reporter.close()  # before the message, or the bar would be drawn over it
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    except KeyboardInterrupt:
        reporter.close()
        print("interrupted", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        reporter.close()
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(url: str) -> None:
    """Raises StoreError when the store ends by itself."""
    with Store(url) as store:
        while True:
            time.sleep(WATCH_EVERY_S)
            store.ping()


@contextmanager
def _workers(engine: str, asked: int | None, rows: int, folder: Path, model: Bundle, store: Store) -> Iterator[Workers]:
    """This process alone where the data is small, for others take seconds to start, or where they would share a GPU."""
    if engine not in ("local", "ray"):
        raise InputError(f"engine {engine!r} is unknown: wanted local or ray")
    cores = os.cpu_count() or 1
    large = engine == "ray" or (rows >= PARALLEL_ROWS and model.device.type == "cpu")
    count = asked or (cores if large else 1)
    if engine == "local" and count == 1:
        keep_freed_memory()
        yield ThisProcess(model, store)
        return
    threads = 1 if engine == "ray" else max(1, cores // count)
    with _engine(engine)(folder, str(model.device), store.address, count, threads) as found:
        yield found


def _engine(name: str) -> "type[Processes] | type[RayWorkers]":
    if name == "local":
        return Processes
    try:
        from cache_builder.ray_workers import RayWorkers  # noqa: PLC0415  an extra: only this function needs it
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install '.[ray]' in the checkout, or leave it out") from error
    return RayWorkers


def _finder(bundle: Path, previous: Path | None) -> Callable[[str], Bundle | None]:
    """Loads the published model: from `previous` if that is given, else from beside `bundle` if it is there."""

    def find(model_id: str) -> Bundle | None:
        folder = previous or bundle.resolve().parent / model_id
        if previous is None and not folder.is_dir():
            return None
        found = load_bundle(folder)
        if found.model_id != model_id:
            raise InputError(
                f"{folder} is model {found.model_id}, published is {model_id}: give the bundle of that one"
            )
        return found

    return find


def _precision(text: str) -> Precision:
    for precision in PRECISIONS:
        if text == precision:
            return precision
    raise InputError(f"precision {text!r} is unknown: wanted one of {', '.join(PRECISIONS)}")


def _print_json(value: dict[str, Any]) -> None:
    print(orjson.dumps(value).decode(), flush=True)


if __name__ == "__main__":
    app()
