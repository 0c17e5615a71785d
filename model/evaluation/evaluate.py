"""Evaluation of a bundle as it serves, on the requests after T.

fresh    a request sees all behaviours before its session: what a cache that is always up to date would give.
as-of    histories are frozen at T and the requests come after it: what a cache built at T serves.

Both judge the same requests, with vocabulary, popularity and negatives from before T, so their difference is the price
of staleness; `Judge.stale` asks for it by the number of behaviours that a record lacks. `Judgement.write` keeps the
requests as samples.parquet, which a replay over HTTP sends unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.bundle import Bundle
from model.evaluation.metrics import auc, counted_groups, gauc
from model.evaluation.served import served_logits
from model.evaluation.slices import by_history, is_new_item
from model.evaluation.staleness import View, fresh_view, frozen_view, stale_view
from model.log.batches import BatchSource, equal_sized, in_pieces, most_candidates
from model.log.behaviours import Bools, DataError, Int64s, InteractionLog, other_unit
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import Requests, add_negatives, collect_requests, only_known_items, popularity_pool
from model.vocabulary import MISSING

Protocol = Literal["fresh", "as-of"]
_BATCH_REQUESTS = 64
# What the caches know of the users of these requests.
_Sight = Callable[[Requests], View]


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
    history_rows: Int64s  # [n], all behaviours before the request's session, whatever the protocol
    new_items: Bools  # [m], the item is nowhere among those behaviours

    def metrics(self) -> dict[str, float]:
        """AUC over all candidates and GAUC over requests."""
        labels, groups = self.requests.labels, self.requests.request_of_candidate
        return {"auc": auc(labels, self.logits), "gauc": gauc(groups, labels, self.logits)}

    def slices(self) -> dict[str, Any]:
        """What the metrics rest on: requests that GAUC counts, candidates new to their user, lengths of history."""
        requests, new = self.requests, self.new_items
        return {
            "gauc_requests": counted_groups(requests.request_of_candidate, requests.labels),
            "new_items": float(new.mean()),
            "auc_new_items": auc(requests.labels[new], self.logits[new]),
            "by_history": by_history(requests, self.logits, self.history_rows),
        }

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


class Judge:
    """One bundle and the requests after T of one log, encoded once for everything that is asked of them."""

    def __init__(self, bundle: Bundle, log: InteractionLog, config: EvaluationConfig) -> None:
        """Raises DataError if T is before the bundle's training cut (the model would have seen the answers), if there
        is no request after T, or if the log's ids, columns or unit of time are not the bundle's.
        """
        cut = bundle.metadata["as_of"]
        if config.as_of < cut:
            raise DataError(
                f"T is {config.as_of}, but model {bundle.model_id} was trained on rows up to {cut}: judge it after that"
            )
        refusal = other_unit(f"the newest row of {log.folder}", int(log.timestamp.max()), bundle.model_id, cut)
        if refusal is not None:
            raise DataError(refusal)
        self._bundle, self._log, self._config = bundle, log, config
        self._encoded = encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)
        self.requests, self._dropped = requests_after(log, self._encoded.context_codes.numpy(), config)
        self._live = Histories.live(log)
        cuts = self._live.cuts_before(self.requests.user, self.requests.before)
        self._history_rows = cuts - self._live.offsets[self.requests.user]
        self._new_items = is_new_item(self._live, self.requests, cuts)

    def judge(self, protocol: Protocol, *, as_trained: bool = False) -> Judgement:
        """Score from compressed histories, as the service does.

        as_trained: in the form that was trained, from whole histories, which is all there is of a model that cannot be
        cached. Raises ValueError where pairs are shuffled, which that form does not read.
        """
        if self._config.shuffle_pairs and (as_trained or not self._bundle.config.cacheable):
            raise ValueError("only a model that is scored from compressed histories has pairs to shuffle")
        if protocol == "fresh":
            return self._judgement(lambda requests: fresh_view(self._live, requests), as_trained)
        frozen = Histories.frozen(self._log, self._config.as_of)
        return self._judgement(lambda requests: frozen_view(frozen, requests), as_trained)

    def stale(self, behaviours: int, *, recent_items: bool = True) -> Judgement:
        """Score from records that lack each user's newest `behaviours` rows; recent_items: requests bring those."""
        return self._judgement(
            lambda requests: stale_view(self._live, requests, behaviours, recent_items=recent_items), as_trained=False
        )

    def staleness(self, behaviours: Sequence[int]) -> list[dict[str, Any]]:
        """AUC and GAUC by what records lack, with recent items and without."""
        rows = []
        for count in behaviours:
            found = self.stale(count).metrics()
            without = found if count == 0 else self.stale(count, recent_items=False).metrics()
            rows.append({"behaviours": count, **found, **{f"{name}_without_recent": without[name] for name in without}})
        return rows

    def _judgement(self, sight: _Sight, as_trained: bool) -> Judgement:
        compressed = self._bundle.config.cacheable and not as_trained
        requests = self.requests if compressed else in_pieces(self.requests)
        batches = self._in_order(requests) if compressed else self._by_size(requests, sight)
        place_of_candidate = replace(requests, items=np.arange(len(requests.items), dtype=np.int32))
        logits = np.empty(len(requests.items), dtype=np.float32)
        for index in batches:
            scored = self._logits(requests.only(index), sight, as_trained)
            logits[place_of_candidate.only(index).items] = scored.cpu().numpy()
        return Judgement(self.requests, logits, self._dropped, self._history_rows, self._new_items)

    def _in_order(self, requests: Requests) -> Iterator[Int64s]:
        for start in range(0, len(requests), _BATCH_REQUESTS):
            yield np.arange(start, min(start + _BATCH_REQUESTS, len(requests)))

    def _by_size(self, requests: Requests, sight: _Sight) -> Iterator[Int64s]:
        view = sight(requests)
        rows = view.long_cuts - view.histories.offsets[requests.user]
        return equal_sized(requests, rows, most_candidates(self._bundle.config, self._bundle.device))

    @torch.no_grad()
    def _logits(self, requests: Requests, sight: _Sight, as_trained: bool) -> torch.Tensor:
        ranker, view = self._bundle.ranker, sight(requests)
        source = BatchSource(self._encoded, view.histories, self._bundle.config, self._bundle.device)
        batch = source.batch(requests, view.short_cuts, view.long_cuts)
        batch.user_codes[torch.from_numpy(~view.recorded).to(batch.user_codes.device)] = MISSING
        if as_trained:
            return ranker.logits(batch)
        if not self._config.shuffle_pairs:
            return served_logits(ranker, batch)
        lent = replace(requests, user=(requests.user + 1) % len(self._log.user_ids))
        return served_logits(ranker, batch, source.long_histories(lent, sight(lent).long_cuts))


def evaluate(bundle: Bundle, log: InteractionLog, protocol: Protocol, config: EvaluationConfig) -> Judgement:
    """Judge a bundle once. Raises DataError as `Judge` does."""
    return Judge(bundle, log, config).judge(protocol)


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
