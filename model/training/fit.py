"""The steps of one training, its validations and its checkpoints.

Everything that the steps to come depend on is in `State`, the ranker and the optimiser. All three go into a
checkpoint, and the batches follow from the seed and the step, so a training that goes on from one ends with the same
weights, bit by bit (on a CPU, with the same number of threads and the same version of torch).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.lrea import LreaAttention
from model.log.batches import BatchSource
from model.log.samples import Requests
from model.ranker import Output, Ranker
from model.recipe import TrainingConfig
from model.training.checkpoint import CheckpointError, CheckpointFile, Saved
from model.training.distributed import ALONE, Workers
from model.training.split import Split, batches_from, steps_per_epoch
from model.training.validation import evaluate_ranker

# Called with (steps done, steps in all, loss of the step).
Progress = Callable[[int, int, float], None]
_FEWEST_CANDIDATES = 2  # of one, BatchNorm has no variance


@dataclass
class State:
    """How far a training has come, and its best weights so far: those with the best AUC on held-out time."""

    step: int = 0
    samples: int = 0
    step_seconds: float = 0.0  # of the steps alone
    seconds: float = 0.0  # of all of it
    best_auc: float = -math.inf
    best_step: int = 0
    stale: int = 0  # validations since
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        """Of the steps alone: without validations and preparation."""
        return self.samples / self.step_seconds if self.step_seconds else 0.0


@dataclass(frozen=True)
class Fitting:
    """One training: what is learnt from, how, by whom, and where its checkpoints are."""

    source: BatchSource
    split: Split
    options: TrainingConfig
    workers: Workers = ALONE
    checkpoint: CheckpointFile | None = None
    offers_start: bool = False  # whether the weights before the first step may be the best

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return steps_per_epoch(self.split, self.options) * self.options.epochs

    def fit(self, ranker: Ranker, saved: Saved | None, progress: Progress) -> State:
        """Train from where `saved` says, or from the start, to the last step or until `patience` is out.

        The ranker is left as the last step made it. Raises DivergedError, and CheckpointError if `saved` does not fit.
        """
        engine = self.workers.wrap(ranker)
        optimizer = make_optimizer(ranker, self.options)
        state = State() if saved is None else _restore(saved, ranker, optimizer)
        before, started = state.seconds, time.monotonic()
        if self.offers_start and saved is None:
            self._validate(ranker, state)
        for batch in batches_from(self.split, self.options, state.step):
            if self._is_over(state):
                break
            loss = self._step(engine, ranker, optimizer, batch, state)
            progress(state.step, self.steps, loss)
            validated = self._validates(state.step)
            if validated:
                self._validate(ranker, state)
            state.seconds = before + time.monotonic() - started
            self._keep(ranker, optimizer, state, validated)
        return state

    def _step(
        self, engine: nn.Module, ranker: Ranker, optimizer: torch.optim.Optimizer, batch: Requests, state: State
    ) -> float:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = self.options.learning_rate * (1 - state.step / self.steps)
        loss = 0.0
        if len(batch.items) >= _FEWEST_CANDIDATES:
            loss = self._learn(engine, ranker, optimizer, batch)
            state.samples += len(batch.items)
        state.step += 1
        state.step_seconds += time.monotonic() - started
        return loss

    def _learn(self, engine: nn.Module, ranker: Ranker, optimizer: torch.optim.Optimizer, batch: Requests) -> float:
        """One step of the optimiser; returns the cross-entropy of this worker's share."""
        own, weight = self.workers.share(batch)
        samples = next(self.source.batches(own, len(own)))
        engine.train()
        output: Output = engine(samples)
        loss = functional.binary_cross_entropy_with_logits(output.logits, samples.labels_UK[samples.mask_UK])
        objective = (loss + output.auxiliary_loss) * weight
        if isinstance(ranker.long, LreaAttention) and ranker.long.form == "paper":
            objective = objective + self.options.penalty_weight * ranker.long.penalty(self.options.penalty_reduction)
        optimizer.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def _is_over(self, state: State) -> bool:
        out_of_patience = 0 < self.options.patience <= state.stale
        return state.step == self.steps or out_of_patience

    def _validates(self, step: int) -> bool:
        every = max(1, steps_per_epoch(self.split, self.options) // self.options.validations_per_epoch)
        return step % every == 0 or step == self.steps

    def _validate(self, ranker: Ranker, state: State) -> None:
        size = self.options.batch_requests
        found = evaluate_ranker(ranker, self.source, self.split.validation, size, self.workers)["auc"]
        state.stale += 1
        if found > state.best_auc:
            state.best_auc, state.best_step, state.stale = found, state.step, 0
            state.best = {name: tensor.detach().clone() for name, tensor in ranker.state_dict().items()}

    def _keep(self, ranker: Ranker, optimizer: torch.optim.Optimizer, state: State, validated: bool) -> None:
        """Write a checkpoint if it is time for one; of the last step always: other learning rates may follow."""
        if self.checkpoint is None or not self.workers.is_first:
            return
        if self._is_over(state) or self.checkpoint.is_due(state.step, validated):
            self.checkpoint.write(_pack(ranker, optimizer, state))


def make_optimizer(ranker: Ranker, options: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of all weights; Adagrad is the paper's."""
    if options.optimizer == "adagrad":
        return torch.optim.Adagrad(ranker.parameters(), lr=options.learning_rate)
    return torch.optim.Adam(ranker.parameters(), lr=options.learning_rate, fused=True)


_FACTS = ("step", "samples", "step_seconds", "seconds", "best_auc", "best_step", "stale")


def _pack(ranker: Ranker, optimizer: torch.optim.Optimizer, state: State) -> Saved:
    tensors = {f"model.{name}": tensor for name, tensor in ranker.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    tensors["random"] = torch.get_rng_state()
    facts = {name: getattr(state, name) for name in _FACTS}
    return Saved(facts, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _restore(saved: Saved, ranker: Ranker, optimizer: torch.optim.Optimizer) -> State:
    """Set ranker, optimiser and torch's random numbers as they were."""
    try:
        ranker.load_state_dict(_under("model.", saved.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", saved.tensors).items():
            index, _, part = name.partition(".")
            moments.setdefault(int(index), {})[part] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(saved.tensors["random"])
        device = ranker.item_embedding.weight.device
        best = {name: tensor.to(device) for name, tensor in _under("best.", saved.tensors).items()}
        return State(**{name: saved.facts[name] for name in _FACTS}, best=best)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({error}): other code has written it, delete it to start anew"
        ) from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
