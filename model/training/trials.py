"""One training per learning rate to be tried, all from the same start and with the same batches; the best is kept."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from model.bundle import Bundle
from model.ranker import Ranker
from model.recipe import TrainingConfig
from model.training.checkpoint import CheckpointFile, CheckpointPlan, Saved
from model.training.distributed import Workers
from model.training.fit import Fitting, Progress, State
from model.training.learning_rate import RateChoice, choose_learning_rate
from model.training.material import Material
from model.training.split import batches_from
from model.training.validation import DivergedError
from model.training.warm_start import CALIBRATION_BATCHES, Inheritance, calibrate, inherit


@dataclass(frozen=True)
class Fitted:
    """A ranker with its best weights."""

    ranker: Ranker
    start: Tensor  # the item embeddings [rows, d] before the first step
    state: State
    inheritance: Inheritance | None


def starting_ranker(
    material: Material, options: TrainingConfig, bundle: Bundle | None
) -> tuple[Ranker, Inheritance | None]:
    """A ranker before its first step: random, but for what it takes over from a bundle."""
    torch.manual_seed(options.seed)
    ranker = material.fresh_ranker()
    inheritance = None
    if bundle is not None:
        inheritance = inherit(ranker, material.catalogue, material.users, material.context, bundle)
    material.order_content(ranker)
    if inheritance is not None and inheritance.has_mlp:
        some = islice(batches_from(material.split, options, 0), CALIBRATION_BATCHES)
        calibrate(ranker, (next(material.source.batches(requests, len(requests))) for requests in some))
    return ranker, inheritance


@dataclass
class Trials:
    """The trainings of one model."""

    material: Material
    options: TrainingConfig
    rates: tuple[float, ...]
    plan: CheckpointPlan | None
    warm_start: Bundle | None
    workers: Workers
    progress: Progress
    note: Callable[[str], None]
    seconds_before: float = 0.0  # of what an interrupted process had done
    _fitted: dict[float, Fitted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoints = {rate: self._checkpoint(rate) for rate in self.rates}
        files = [checkpoint for checkpoint in self.checkpoints.values() if checkpoint is not None]
        resumes = self.plan is not None and self.plan.resume
        if not resumes:
            for checkpoint in files:
                checkpoint.refuse_leftover()
        elif not any(checkpoint.path.exists() for checkpoint in files):
            files[0].refuse_another()
            self.note(f"there is no checkpoint in {files[0].folder}: starting from the beginning")

    def run(self) -> tuple[RateChoice, Fitted]:
        """Train with every rate. Raises CheckpointError and WarmStartError; DivergedError if there is one rate only."""
        choice = choose_learning_rate(self.rates, self._validate)
        return choice, self._fitted[choice.best]

    def remove_checkpoints(self) -> None:
        """What they were for is done."""
        for checkpoint in self.checkpoints.values():
            if checkpoint is not None and self.workers.is_first:
                checkpoint.remove()

    def _validate(self, rate: float) -> float:
        try:
            fitted = self._fit(rate)
        except DivergedError as error:
            if len(self.rates) == 1:
                raise
            self.note(f"learning rate {rate:g}: {error}")
            return math.nan
        found = fitted.state.best_auc
        best = max((other.state.best_auc for other in self._fitted.values()), default=-math.inf)
        if found >= best:  # only those that may yet be chosen are kept in memory
            self._fitted = {key: other for key, other in self._fitted.items() if other.state.best_auc == found}
            self._fitted[rate] = fitted
        return found

    def _fit(self, rate: float) -> Fitted:
        options, checkpoint = replace(self.options, learning_rate=rate), self.checkpoints[rate]
        ranker, inheritance = starting_ranker(self.material, options, self.warm_start)
        start = ranker.item_embedding.weight.detach().clone()
        is_warm = inheritance is not None
        fitting = Fitting(self.material.source, self.material.split, options, self.workers, checkpoint, is_warm)
        saved = None if checkpoint is None else self._resume(checkpoint, fitting.steps)
        before = self.rates.index(rate) * fitting.steps

        def progress(done: int, steps: int, loss: float) -> None:
            self.progress(before + done, steps * len(self.rates), loss)

        state = fitting.fit(ranker, saved, progress)
        if state.best_step == 0:
            self.note("no step made the older bundle's weights better on the requests held out: they stay as they are")
        ranker.load_state_dict(state.best)
        state.best = {}
        return Fitted(ranker, start, state, inheritance)

    def _resume(self, checkpoint: CheckpointFile, steps: int) -> Saved | None:
        if self.plan is None or not self.plan.resume:
            return None
        saved = checkpoint.read()
        if saved is not None:
            self.note(f"resuming from {checkpoint.path}, step {saved.facts['step']} of {steps}")
            self.seconds_before += saved.facts["seconds"]
        return saved

    def _checkpoint(self, rate: float) -> CheckpointFile | None:
        if self.plan is None:
            return None
        return CheckpointFile(self.plan.folder, self._fingerprint(rate), self.plan.every_steps)

    def _fingerprint(self, rate: float) -> dict[str, Any]:
        """Everything that decides the weights. The tolerance of the gap does not: it may be raised to resume."""
        training = {**asdict(self.options), "learning_rate": rate}
        del training["absorption_tolerance"]
        groups = {"model": asdict(self.material.config), "training": training, "data": self.material.data}
        named = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        start = None if self.warm_start is None else self.warm_start.model_id
        return {**named, "T": self.material.as_of, "warm start": start, "workers": self.workers.count}
