"""What a build was, for Prometheus: a textfile for a node exporter. A job has ended before anybody scrapes it."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from cache_builder.errors import InputError
from cache_builder.options import Summary

# name -> what it says; of a build that failed there are only the first two
GAUGES = {
    "lrea_build_succeeded": "1 if the newest build published or held its generation, 0 if it failed or was stopped",
    "lrea_build_ended_timestamp_seconds": "when the newest build ended, Unix time",
    "lrea_build_seconds": "seconds from its start to its end",
    "lrea_build_users": "users cached",
    "lrea_build_copied_users": "of them, whose records were copied by a refresh",
    "lrea_build_rows": "rows of the data",
    "lrea_build_bad_rows": "rows that could not be used",
    "lrea_build_record_bytes": "bytes of all records",
    "lrea_build_unknown_items": "behaviours with an item that the model does not know, as a part of all",
    "lrea_build_coverage": "users, as a part of the generation's before",
    "lrea_build_memory": "the store's memory as a part of its maxmemory, as predicted",
    "lrea_build_norm_drift": "change of the pairs' mean norm",
    "lrea_build_score_drift": "mean change of a probability",
}


@contextmanager
def reporting(path: Path | None, key_prefix: str) -> Iterator[list[Summary]]:
    """Write the file when the block ends, however it does. The list takes the summary of a build that published.

    path: None writes nothing. Raises InputError at once if there is no folder for it.
    """
    if path is not None and not path.parent.is_dir():
        raise InputError(f"--metrics-file: {path.parent} is not a folder: give one that the node exporter reads")
    done: list[Summary] = []
    try:
        yield done
    finally:
        if path is not None:
            try:
                write_metrics(path, key_prefix, done[0] if done else None)
            except OSError as error:  # it must not hide how the build ended
                print(f"--metrics-file {path} could not be written: {error}", file=sys.stderr)


def write_metrics(path: Path, key_prefix: str, summary: Summary | None) -> None:
    """Write the file in one step. summary: None for a build that failed. What was not measured is left out."""
    values = {"succeeded": float(summary is not None), "ended_timestamp_seconds": time.time()}
    if summary is not None:
        gate = summary.gate
        measured = {
            "seconds": summary.seconds, "users": summary.users, "copied_users": summary.copied, "rows": summary.rows,
            "bad_rows": summary.bad_rows, "record_bytes": summary.record_bytes, "unknown_items": gate.unknown,
            "coverage": gate.coverage,
            "memory": gate.memory, "norm_drift": gate.norm_drift, "score_drift": gate.score_drift,
        }  # fmt: skip
        values |= {name: value for name, value in measured.items() if value is not None}
    registry = CollectorRegistry()
    for name, help_text in GAUGES.items():
        value = values.get(name.removeprefix("lrea_build_"))
        if value is not None:
            Gauge(name, help_text, ["key_prefix"], registry=registry).labels(key_prefix).set(value)
    write_to_textfile(str(path), registry)
