"""One batch: one read of the store, one forward. Everything but the read runs on a thread, off the event loop.

A read that fails degrades the batch's scores and says so; it is never taken for users that are not there. A record
that fails any check is counted and treated as a miss.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.cache_format import Reason, RecordError, UserRecord, decode
from model.identifiers import Id
from model.ranker import ScoringInput
from service.active import NO_ACTIVE_GENERATION, ActiveModel
from service.errors import StoreError
from service.metrics import Metrics
from service.prepare import ScoringJob
from service.store import Store
from service.timing import Stages
from service.users import Origin, User, from_record, from_rows

# What `degraded` says per reason of the record codec. A record of another user, model or generation is one word for
# the caller, three for the metric.
DEGRADED_BY_RECORD: Mapping[Reason, str] = {
    Reason.CORRUPT: "record_corrupt",
    Reason.SHAPE: "record_corrupt",
    Reason.FUTURE_VERSION: "record_future_version",
    Reason.FOREIGN_MODEL: "record_foreign",
    Reason.FOREIGN_GENERATION: "record_foreign",
    Reason.FOREIGN_USER: "record_foreign",
}


@dataclass(frozen=True, eq=False)
class Score:
    """The answer to one job."""

    logits_B: npt.NDArray[np.float32]  # what ranks: above a logit of 17 every probability in float32 is 1
    probabilities_B: npt.NDArray[np.float32]
    origin: Origin
    gap_rows: int
    dropped_rows: int
    degraded: tuple[str, ...]


@dataclass(frozen=True)
class _Fetched:
    """Stored bytes by user, or why there are none. A user missing from `payloads` was not asked for."""

    payloads: Mapping[Id, bytes | None]
    trouble: str | None = None


@dataclass(frozen=True, eq=False)
class _Found:
    """A user's record, decoded; or None with the reason, if there was one."""

    record: UserRecord | None
    trouble: str | None = None


class Scorer:
    """Scores batches of one model each."""

    def __init__(self, store: Store, executor: Executor, metrics: Metrics) -> None:
        self._store = store
        self._executor = executor
        self._metrics = metrics

    async def score(self, jobs: Sequence[ScoringJob]) -> list[Score]:
        """One answer per job, in order; the jobs' stages are completed. All jobs are of one model."""
        stages = Stages()
        with stages.measure("fetch"):
            fetched = await self._fetch(jobs)
        loop = asyncio.get_running_loop()
        scores = await loop.run_in_executor(self._executor, self._compute, jobs, fetched, stages)
        self._metrics.batch_requests.observe(len(jobs))
        for job in jobs:
            job.stages.update(stages)
        return scores

    async def _fetch(self, jobs: Sequence[ScoringJob]) -> _Fetched:
        """Every record that the jobs need, each user once."""
        model = jobs[0].model
        user_ids = list(dict.fromkeys(job.user_id for job in jobs if job.user is None))
        if model.generation is None:
            trouble = self._store.trouble
            return _Fetched({}, trouble.reason if trouble else NO_ACTIVE_GENERATION)
        try:
            return _Fetched(await self._store.read_records(model.model_id, model.generation, user_ids))
        except StoreError as error:
            return _Fetched({}, error.reason)

    def _compute(self, jobs: Sequence[ScoringJob], fetched: _Fetched, stages: Stages) -> list[Score]:
        with stages.measure("decode"):
            found = self._decode(jobs[0].model, fetched)
        with stages.measure("transfer"):
            users = [_user(job, found) for job in jobs]
            inputs = [_scoring_input(job, user) for job, user in zip(jobs, users, strict=True)]
        with stages.measure("compute"):
            scores = _logits_and_probabilities(jobs[0].model, inputs)
        store_trouble = self._store.trouble
        return [
            Score(
                logits_B,
                probabilities_B,
                user.origin,
                user.gap_rows,
                user.dropped_rows,
                _degraded(job, fetched, found, store_trouble),
            )
            for job, user, (logits_B, probabilities_B) in zip(jobs, users, scores, strict=True)
        ]

    def _decode(self, model: ActiveModel, fetched: _Fetched) -> dict[Id, _Found]:
        return {
            user_id: _Found(None) if data is None else self._decode_one(model, user_id, data)
            for user_id, data in fetched.payloads.items()
        }

    def _decode_one(self, model: ActiveModel, user_id: Id, data: bytes) -> _Found:
        assert model.generation is not None
        try:
            return _Found(decode_record(model, model.generation, user_id, data))
        except RecordError as error:
            self._metrics.record_errors.labels(error.reason).inc()
            return _Found(None, DEGRADED_BY_RECORD[error.reason])


def decode_record(model: ActiveModel, generation: str, user_id: Id, data: bytes) -> UserRecord:
    """The record, checked to be this user's, of this model and generation. Raises RecordError."""
    return decode(
        data, model_id=model.model_id, generation=generation, user_id=user_id, shape=model.bundle.record_shape
    )


def _user(job: ScoringJob, found: Mapping[Id, _Found]) -> User:
    if job.user is not None:
        return job.user
    record = found[job.user_id].record if job.user_id in found else None
    if record is None:
        return from_rows(job.model, (), job.recent)
    return from_record(job.model, record, job.recent)


def _degraded(
    job: ScoringJob, fetched: _Fetched, found: Mapping[Id, _Found], store_trouble: StoreError | None
) -> tuple[str, ...]:
    """Why this answer is worse than it could be.

    A request that brings its history asks nothing of the store, and says all the same when that is known to be away.
    """
    if job.user is not None:
        return () if store_trouble is None else (store_trouble.reason,)
    troubles = (fetched.trouble, found[job.user_id].trouble if job.user_id in found else None)
    return tuple(trouble for trouble in troubles if trouble is not None)


def _scoring_input(job: ScoringJob, user: User) -> ScoringInput:
    device = job.model.device
    return ScoringInput(
        user.state, user.short, user.user_codes, job.context_codes.to(device), job.candidates.to(device)
    )


def _logits_and_probabilities(
    model: ActiveModel, inputs: Sequence[ScoringInput]
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    parts = model.bundle.serving.score_many(inputs)
    logits = torch.cat(parts).to(torch.float32)
    both = torch.stack([logits, torch.sigmoid(logits)]).cpu()
    assert bool(torch.isfinite(both[1]).all()), "the model gave a score that is not a number"
    split = torch.split(both, [len(part) for part in parts], dim=1)
    return [(logits_B, probabilities_B) for logits_B, probabilities_B in (part.numpy() for part in split)]
