"""The two steps of a batch: what its users need, then one forward. Everything but reading runs on a thread.

Where users come from is `UserLookup`'s to know, what is done with a list of them the model's.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.catalogue import Items
from model.identifiers import Id
from model.ranker import ScoringInput
from service.active import ActiveModel
from service.batching.backlog import Backlog
from service.batching.compute_thread import ComputeThread
from service.batching.prepare import ScoringJob
from service.errors import StoreError
from service.store.reads import Store
from service.tally import Tally
from service.users.lookup import Fetched, Found, UserLookup
from service.users.state import Origin, User, from_rows, from_stored

Floats = npt.NDArray[np.float32]


class Score(NamedTuple):
    """The answer to one job."""

    logits_B: Floats  # what ranks: above a logit of 17 every probability in float32 is 1
    probabilities_B: Floats
    origin: Origin
    gap_rows: int
    dropped_rows: int
    unknown_candidates: int
    degraded: tuple[str, ...]


class Scorer:
    """Scores batches of one model each: the steps of a `Batcher`."""

    def __init__(self, lookup: UserLookup, store: Store, backlog: Backlog, thread: ComputeThread, tally: Tally) -> None:
        """thread: it alone writes to resident users' memory."""
        self._lookup = lookup
        self._store = store
        self._backlog = backlog
        self._thread = thread
        self._tally = tally

    def turn(self, work: ScoringJob) -> float:
        """When the job should be scored, as the backlog says."""
        return self._backlog.turn(work.size, work.deadline)

    def most(self) -> int:
        """The candidates up to which a batch may grow now, as the backlog says."""
        return self._backlog.batch_now

    async def fetch(self, works: Sequence[ScoringJob]) -> Fetched:
        """Everything that the jobs' users need, each user once. All jobs are of one model."""
        user_ids = list(dict.fromkeys(job.user_id for job in works if job.user is None))
        fetched = await self._lookup.fetch(works[0].model, user_ids)
        for job in works:
            job.stages.update(fetched.reading)
        return fetched

    def merge(self, fetched: Fetched, more: Fetched) -> None:
        """Add what was fetched for other jobs of the same model."""
        self._lookup.merge(fetched, more)

    def join(self, work: ScoringJob, fetched: Fetched) -> bool:
        """Whether the job can be scored with the batch, without another read."""
        return work.user is not None or self._lookup.join(fetched, work.user_id)

    def compute(self, works: Sequence[ScoringJob], fetched: Fetched) -> Awaitable[list[Score]]:
        """One answer per job, in order; the jobs' stages are completed."""
        self._backlog.begun(sum([job.size for job in works]))
        # Unpinned when the thread is done with the slots or will never begin, whether or not anybody still waits.
        running = self._thread.submit(partial(self._compute, works, fetched), partial(self._lookup.unpin, fetched))
        return self._computed(running, works, fetched)

    async def _computed(
        self, running: asyncio.Future[list[Score]], works: Sequence[ScoringJob], fetched: Fetched
    ) -> list[Score]:
        scored = False
        try:
            scores = await running
            scored = True
        finally:
            self._lookup.let_go(fetched)
            self._backlog.done(scored=scored)
        self._tally.computed(len(works))
        for job in works:
            job.stages.update(fetched.stages)
        return scores

    def discard(self, fetched: Fetched) -> None:
        """Give back what was fetched for jobs that will not be scored."""
        self._lookup.unpin(fetched)
        self._lookup.let_go(fetched)

    def _compute(self, jobs: Sequence[ScoringJob], fetched: Fetched) -> list[Score]:
        model, stages = fetched.model, fetched.stages
        with stages.measure("decode"):
            found = self._lookup.decode(fetched)
        with stages.measure("encode"):
            candidates, unknown = _look_up(model, jobs)
        users, scores = self._score(jobs, candidates, fetched, found)
        if not scores.are_finite:  # a record may pass every check and hold numbers whose products are none
            unscored = [job for job, of_one in zip(jobs, scores.split(jobs), strict=True) if not of_one.are_finite]
            found |= {job.user_id: self._lookup.refuse(model, job.user_id) for job in unscored if job.user is None}
            users, scores = self._score(jobs, candidates, fetched, found)
            assert scores.are_finite, "the model gave a score that is not a number"
        store_trouble = self._store.trouble
        return [
            Score(
                *of_one,
                user.origin,
                user.gap_rows,
                user.dropped_rows,
                unknown_candidates,
                _degraded(job, fetched, found, store_trouble),
            )
            for job, user, unknown_candidates, of_one in zip(jobs, users, unknown, scores.split(jobs), strict=True)
        ]

    def _score(
        self, jobs: Sequence[ScoringJob], candidates: Sequence[Items], fetched: Fetched, found: Mapping[Id, Found]
    ) -> "tuple[list[User], _Scores]":
        """The users' side of each job, and all jobs' scores."""
        with fetched.stages.measure("transfer"):
            users = [_user(job, found) for job in jobs]
            inputs = [_scoring_input(*each) for each in zip(jobs, users, candidates, strict=True)]
        with fetched.stages.measure("compute"):
            return users, _Scores.of(fetched.model, inputs)


class _Scores(NamedTuple):
    """Of all candidates of a batch, or of one job's, N."""

    logits_N: Floats
    probabilities_N: Floats

    @classmethod
    def of(cls, model: ActiveModel, inputs: Sequence[ScoringInput]) -> "_Scores":
        parts = (model.bundle.graphs or model.bundle.serving).score_many(inputs)
        logits_N = parts[0] if len(parts) == 1 else torch.cat(parts)
        return cls(logits_N.numpy(), torch.sigmoid(logits_N).numpy())

    def split(self, jobs: Sequence[ScoringJob]) -> "list[_Scores]":
        """Each job's, in order."""
        ends = [0, *accumulate(job.size for job in jobs)]
        return [_Scores(self.logits_N[a:b], self.probabilities_N[a:b]) for a, b in pairwise(ends)]

    @property
    def are_finite(self) -> bool:
        return bool(np.isfinite(self.probabilities_N).all())


def _look_up(model: ActiveModel, jobs: Sequence[ScoringJob]) -> tuple[list[Items], list[int]]:
    """Every job's candidates, and how many of them are unknown; those that are still to be looked up in one go."""
    late = [job.candidate_ids for job in jobs if job.candidates is None]
    together = iter(zip(*model.bundle.catalogue.encode_together(late), strict=True)) if late else iter(())
    pairs = [next(together) if job.candidates is None else (job.candidates, job.candidates.unknown) for job in jobs]
    return [items for items, _ in pairs], [unknown for _, unknown in pairs]


def _user(job: ScoringJob, found: Mapping[Id, Found]) -> User:
    if job.user is not None:
        return job.user
    stored = found[job.user_id].user if job.user_id in found else None
    return from_rows(job.model, (), job.recent) if stored is None else from_stored(job.model, stored, job.recent)


def _degraded(
    job: ScoringJob, fetched: Fetched, found: Mapping[Id, Found], store_trouble: StoreError | None
) -> tuple[str, ...]:
    """Why this answer is worse than it could be.

    A request that asks nothing of the store, for it brings its history or its user is resident, says all the same when
    that is known to be away.
    """
    known = found.get(job.user_id)
    if job.user is not None or (known is not None and known.resident):
        return () if store_trouble is None else (store_trouble.reason,)
    trouble = fetched.trouble if known is None else known.trouble
    return () if trouble is None else (trouble,)


def _scoring_input(job: ScoringJob, user: User, candidates: Items) -> ScoringInput:
    return ScoringInput(user.state, user.short, user.user_codes, job.context_codes, candidates)
