"""Replay the requests of an as-of-T evaluation over HTTP, unchanged, and judge the answers by the same metrics.

    python -m loadtest.replay --samples samples.parquet --url http://127.0.0.1:8000

The last line is JSON: auc and gauc over HTTP, the offline figures of the same file, the largest difference on the logit
between the two, user states, and p50 and p99 by stage. Exit code 1 if an answer is further from the offline logit than
the coarsest storage explains: a cache of another T would give other figures, and better ones. The requests go one after
the other over one connection.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import orjson
import pyarrow.parquet as pq
import typer

from loadtest.api_key import key_headers
from loadtest.client import ScoringClient, ServiceError, logits_of
from model.evaluation.metrics import auc, gauc
from model.progress import stderr_reporter

TOLERANCE = 7e-2  # on the logit: int8, the coarsest storage of a pair (docs/model.md)
_COLUMNS = ("request_id", "user_id", "timestamp", "candidates", "labels", "logits")


def replay(samples: Path, url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Send every request of `samples` and compare. Raises ServiceError for an answer that breaks the contract."""
    rows, model_id = _read(samples)
    reporter, states, scored = stderr_reporter(), Counter[str](), []
    reporter.start("replaying", len(rows), "requests")
    try:
        with ScoringClient(url, headers) as client:
            for row in rows:
                context = {name: value for name, value in row.items() if name not in _COLUMNS}
                answer = client.score(row["user_id"], row["candidates"], context)
                if answer["model_id"] != model_id:
                    found = answer["model_id"]
                    raise ServiceError(f"the service serves {found}, {samples} was judged by {model_id}: serve that")
                if answer["degraded"]:
                    raise ServiceError(f"user {row['user_id']!r}: degraded {answer['degraded']}: is the store up?")
                states[answer["user_state"]] += 1
                scored.append(logits_of(answer["scores"]))
                reporter.advance(1)
            stages = client.stages.percentiles()
    finally:
        reporter.close()
    return {**_compare(rows, np.concatenate(scored)), "user_states": dict(states), "latency_ms": stages}


def _read(samples: Path) -> tuple[list[dict[str, Any]], str]:
    """The requests, and the model that judged them. Raises ValueError for a file of another origin."""
    if not samples.is_file():
        raise ValueError(f"{samples} is not a file: `python -m model evaluate --protocol as-of --out` writes one")
    table = pq.read_table(samples)
    model_id = (table.schema.metadata or {}).get(b"model_id")
    if model_id is None or not set(_COLUMNS) <= set(table.column_names):
        raise ValueError(f"{samples} is not what `python -m model evaluate --protocol as-of --out` writes: write it so")
    if table.num_rows == 0:
        raise ValueError(f"{samples} has no requests: choose another T")
    return table.to_pylist(), model_id.decode()


def _compare(rows: list[dict[str, Any]], over_http: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    labels = np.concatenate([row["labels"] for row in rows]).astype(np.int8)
    offline = np.concatenate([row["logits"] for row in rows])
    groups = np.repeat(np.arange(len(rows)), [len(row["labels"]) for row in rows])
    return {
        "requests": len(rows),
        "candidates": len(labels),
        "auc": auc(labels, over_http),
        "gauc": gauc(groups, labels, over_http),
        "auc_offline": auc(labels, offline),
        "gauc_offline": gauc(groups, labels, offline),
        "max_abs_diff_offline": float(np.abs(over_http - offline).max()),
    }


def main(
    samples: Annotated[Path, typer.Option(help="samples.parquet of `python -m model evaluate --protocol as-of --out`")],
    url: Annotated[str, typer.Option(help="where the service answers")] = "http://127.0.0.1:8000",
) -> None:
    """Replay an evaluation over HTTP."""
    try:
        result = replay(samples, url, key_headers(os.environ))
    except httpx.HTTPError as error:
        print(f"error: {url}: {error}: is the service up there?", file=sys.stderr)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(orjson.dumps(result).decode())
    if result["max_abs_diff_offline"] > TOLERANCE:
        print(
            f"error: answers are up to {result['max_abs_diff_offline']:.2g} from the offline logits, wanted at most "
            f"{TOLERANCE}: is the cache built from the same data and as of the T of the samples?",
            file=sys.stderr,
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
