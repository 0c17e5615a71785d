"""What is learnt from and what the best weights are chosen on: requests before T, the newest of them held out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model.log.behaviours import DataError, Int32s, InteractionLog
from model.log.samples import (
    ContextCodes,
    Requests,
    add_negatives,
    limit_candidates,
    newest_requests,
    only_known_items,
    popularity_pool,
)
from model.recipe import TrainingConfig


@dataclass(frozen=True)
class Split:
    """The requests of a training, all before T."""

    training: Requests  # what was clicked, and what was shown and not clicked where the log knows it
    validation: Requests  # the later ones, with negatives
    pool: Int32s | None  # items to draw negatives from; None where the log has them


def split_by_time(
    log: InteractionLog, context_codes: ContextCodes, as_of: int, options: TrainingConfig, rng: np.random.Generator
) -> Split:
    """The newest requests before T: the last of them for validation, the others for training.

    Raises DataError if there are too few.
    """
    most = _most_targets(options, log.draws_negatives)
    begin = int(log.timestamp.min())
    requests = newest_requests(log, context_codes, begin, as_of, options.max_positives, most)
    held_out = max(1, int(len(requests) * options.validation_fraction))
    if held_out >= len(requests):
        raise DataError(f"{log.folder}: {len(requests)} requests before {as_of}: too few to train and to validate on")
    training = requests.only(np.arange(len(requests) - held_out))
    validation = requests.only(np.arange(len(requests) - held_out, len(requests)))
    begin = int(validation.before[0])
    validation = only_known_items(validation, log, begin)
    if not len(validation):
        raise DataError(f"{log.folder}: no item has rows both before and after {begin}: too few to validate on")
    if not log.draws_negatives:
        return Split(training, validation, pool=None)
    pool = popularity_pool(log, begin)
    return Split(training, add_negatives(validation, pool, options.negatives_per_positive, rng), pool)


def steps_per_epoch(split: Split, options: TrainingConfig) -> int:
    """Steps that one pass over the training requests takes."""
    return -(-len(split.training) // options.batch_requests)


def batches_from(split: Split, options: TrainingConfig, step: int) -> Iterator[Requests]:
    """The requests of each step from `step` on, to the last epoch's end.

    They follow from the seed and the step alone, so that a training that goes on finds the batches it would have had.
    """
    size, per_epoch = options.batch_requests, steps_per_epoch(split, options)
    for epoch in range(step // per_epoch, options.epochs):
        requests = draw_epoch(split, options, epoch)
        done = max(0, step - epoch * per_epoch)
        for start in range(done * size, len(requests), size):
            yield requests.only(np.arange(start, min(start + size, len(requests))))


def draw_epoch(split: Split, options: TrainingConfig, epoch: int) -> Requests:
    """One epoch's requests in random order, with its choice of targets and its negatives."""
    rng = np.random.default_rng([options.seed, 1 + epoch])  # not 0: numpy takes [seed, 0] for [seed], the split's own
    chosen = limit_candidates(split.training, _most_targets(options, split.pool is not None), rng)
    if split.pool is not None:
        chosen = add_negatives(chosen, split.pool, options.negatives_per_positive, rng, positives=split.training)
    return chosen.only(rng.permutation(len(chosen)))


def _most_targets(options: TrainingConfig, draws_negatives: bool) -> int:
    """Rows taken of one request: positives only where negatives are drawn, else both."""
    return options.targets_per_request * (1 if draws_negatives else 1 + options.negatives_per_positive)
