"""What a training is made from, whatever its learning rate: the log as its model reads it, split by time."""

from dataclasses import dataclass

import numpy as np
import torch

from model.bundle import sizes_of
from model.catalogue import Catalogue, FeatureSpec
from model.config import RankerConfig
from model.content_order import order_content
from model.log.batches import BatchSource
from model.log.behaviours import InteractionLog
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.ranker import Ranker
from model.recipe import Recipe
from model.training.split import Split, split_by_time
from model.training.validation import refuse_single_class


@dataclass(frozen=True)
class Material:
    """A log before T, for one model."""

    log: InteractionLog
    as_of: int
    data: dict[str, str]  # the log's fingerprint
    config: RankerConfig
    catalogue: Catalogue
    users: FeatureSpec
    context: FeatureSpec
    source: BatchSource
    split: Split

    def order_content(self, ranker: Ranker) -> None:
        """Give the ranker's content blocks their order, if it has any."""
        order_content(ranker, self.log, self.source.encoded, int(self.split.validation.before[0]))

    def fresh_ranker(self) -> Ranker:
        """A ranker for this material with random weights, on its device."""
        return Ranker(self.config, sizes_of(self.catalogue, self.users, self.context)).to(self.source.device)


def prepare_material(log: InteractionLog, recipe: Recipe, as_of: int, device: torch.device) -> Material:
    """Raises DataError if T is not in the log's unit, or there is nothing to learn from or to validate on."""
    log.check_time(as_of)
    config, catalogue, users, context = fit_columns(log, as_of, recipe.model)
    encoded = encode_log(log, catalogue, users, context)
    rng = np.random.default_rng(recipe.training.seed)
    split = split_by_time(log, encoded.context_codes.numpy(), as_of, recipe.training, rng)
    refuse_single_class(split.validation)
    source = BatchSource(encoded, Histories.live(log), config, device)
    return Material(log, as_of, log.source_fingerprint(), config, catalogue, users, context, source, split)
