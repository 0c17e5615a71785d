"""Evaluation of a bundle as it serves, on the requests after T.

fresh    a request sees all behaviours before its session: what a cache that is always up to date would give.
as-of    histories are frozen at T and the requests come after it: what a cache built at T serves.

Both judge the same requests, with vocabulary, popularity and negatives from before T, so their difference is the price
of staleness. `Judgement.write` keeps the requests as samples.parquet, which a replay over HTTP sends unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.batches import BatchSource
from model.behaviours import DataError, Int64s, InteractionLog
from model.bundle import Bundle
from model.catalogue import Items
from model.encoding import encode_log
from model.histories import Histories
from model.metrics import auc, gauc
from model.ranker import TrainingBatch
from model.samples import Requests, add_negatives, collect_requests, only_known_items, popularity_pool
from model.served import served_logits
from model.vocabulary import MISSING

Protocol = Literal["fresh", "as-of"]
_BATCH_REQUESTS = 64


@dataclass(frozen=True)
class EvaluationConfig:
    """What is judged, and how."""

    as_of: int  # T
    until: int | None = None  # requests with T <= timestamp < until; None: to the end of the log
    negatives_per_positive: int = 4  # where the log has no labels
    seed: int = 0
    shuffle_pairs: bool = False  # every user scored with another user's pair and his own sketch: is the head alive?

    def __post_init__(self) -> None:
        if self.until is not None and self.until <= self.as_of:
            raise ValueError(f"until is {self.until}: wanted a time after T = {self.as_of}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: wanted 0 or more")


@dataclass(frozen=True)
class Judgement:
    """Requests and the logits a bundle gave their candidates."""

    requests: Requests
    logits: npt.NDArray[np.float32]  # [m]
    dropped: int  # candidates that no row before T has, left out

    def metrics(self) -> dict[str, float]:
        """AUC over all candidates and GAUC over requests."""
        labels, groups = self.requests.labels, self.requests.request_of_candidate
        return {"auc": auc(labels, self.logits), "gauc": gauc(groups, labels, self.logits)}

    def write(self, path: Path, log: InteractionLog, bundle: Bundle) -> None:
        """Write samples.parquet: a request a row, with the bundle's context columns, candidates, labels and logits."""
        requests = self.requests
        rows = pa.array(requests.row)
        context = {name: log.context[name].take(rows) for name in bundle.context_features.columns}
        offsets = pa.array(requests.offsets.astype(np.int32))

        def lists(values: pa.Array) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, values)

        table = pa.table(
            {
                "request_id": np.arange(len(requests)),
                "user_id": log.user_ids.take(pa.array(requests.user)),
                "timestamp": requests.before,
                **context,
                "candidates": lists(log.item_ids.take(pa.array(requests.items))),
                "labels": lists(pa.array(requests.labels)),
                "logits": lists(pa.array(self.logits)),
            }
        )
        # A replay refuses a service of another model by this.
        pq.write_table(table.replace_schema_metadata({"model_id": bundle.model_id}), path, compression="zstd")


def evaluate(bundle: Bundle, log: InteractionLog, protocol: Protocol, config: EvaluationConfig) -> Judgement:
    """Score the requests after T from compressed histories, as the service does.

    Raises DataError if T is before the bundle's training cut (the model would have seen the answers), or if there is no
    request after T.
    """
    cut = bundle.metadata["as_of"]
    if config.as_of < cut:
        raise DataError(
            f"T is {config.as_of}, but model {bundle.model_id} was trained on rows up to {cut}: judge it after that"
        )
    encoded = encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)
    requests, dropped = requests_after(log, encoded.context_codes.numpy(), config)
    histories = Histories.live(log) if protocol == "fresh" else Histories.frozen(log, config.as_of)
    source = BatchSource(encoded, histories, bundle.config, bundle.device)
    owners = (requests.user + 1) % len(log.user_ids) if config.shuffle_pairs else None
    logits = [
        served_logits(bundle.ranker, batch, pairs_from).cpu().numpy()
        for batch, pairs_from in _chunks(source, requests, owners, protocol)
    ]
    return Judgement(requests, np.concatenate(logits), dropped)


def requests_after(log: InteractionLog, context_codes: Int64s, config: EvaluationConfig) -> tuple[Requests, int]:
    """The requests that are judged, the same for every bundle and protocol, and the candidates left out."""
    until = int(log.timestamp.max()) + 1 if config.until is None else config.until
    everything = collect_requests(log, context_codes, config.as_of, until)
    known = only_known_items(everything, log, config.as_of)
    if not len(known):
        raise DataError(
            f"{log.folder}: every candidate after {config.as_of} is an item never seen before it: choose a later T"
        )
    dropped = len(everything.items) - len(known.items)
    if log.draws_negatives:
        rng = np.random.default_rng(config.seed)
        known = add_negatives(known, popularity_pool(log, config.as_of), config.negatives_per_positive, rng)
    return known, dropped


def _chunks(
    source: BatchSource, requests: Requests, owners: Int64s | None, protocol: Protocol
) -> Iterator[tuple[TrainingBatch, Items | None]]:
    """Batches of requests, each with the long histories of `owners`, whose pairs score it; None: its own users'."""
    for start in range(0, len(requests), _BATCH_REQUESTS):
        index = np.arange(start, min(start + _BATCH_REQUESTS, len(requests)))
        chunk = requests.only(index)
        cuts = _cuts(source.histories, chunk, protocol)
        batch = source.batch(chunk, cuts)
        if protocol == "as-of":
            # Who has no behaviour as of T has no record, so his features are not known to the service either.
            absent = torch.from_numpy(cuts == source.histories.offsets[chunk.user])
            batch.user_codes[absent.to(batch.user_codes.device)] = MISSING
        if owners is None:
            yield batch, None
            continue
        lent = replace(chunk, user=owners[index])
        yield batch, source.long_histories(lent, _cuts(source.histories, lent, protocol))


def _cuts(histories: Histories, requests: Requests, protocol: Protocol) -> Int64s:
    if protocol == "as-of":
        return histories.ends[requests.user]
    return histories.cuts_before(requests.user, requests.before)
