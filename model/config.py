"""What a ranker is, as values: everything that decides its tensors' shapes and its arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.attention.slots import ROW_BLOCKS, Blocks, Form
from model.identifiers import IdKind
from model.match_sketch import check_cells
from model.options import read_options

LongMethod = Literal["lrea", "din", "sim-hard", "sim-soft", "eta", "sdim", "twin", "none"]


class ConfigError(ValueError):
    """Values that are not a ranker's configuration."""


@dataclass(frozen=True)
class RankerConfig:
    """Shape of a ranker. Raises ValueError where the values cannot be one."""

    width: int = 32  # d, item embedding width
    head_width: int = 32  # h, scorer width
    long_length: int = 512  # L, rows of the long history
    short_length: int = 32  # S, rows of the short window, the newest ones
    rank: int = 32  # r, slots
    long_attention: LongMethod = "lrea"
    form: Form = "absorbed"
    blocks: Blocks = "log"  # of rows, one per slot: where learned slots start, or what slots are
    din_softmax: bool = False  # normalise the weights of DIN over the long history
    retrieved: int | None = None  # rows that SIM, ETA and TWIN attend to; None: as published, 50, 50 and 100
    heads: int = 4  # of the attention over retrieved rows
    category: str | None = None  # item feature that SIM-hard and content blocks go by; None: the first one
    short_attention: bool = True
    match: bool = True
    item_cells: int = 2048  # cells of each of the item's two sketch tables
    feature_cells: int = 512  # the same for each item feature
    feature_width: int = 8  # embedding width of a user or context feature
    mlp: tuple[int, ...] = (512, 256, 128)
    hash_seed: int = 20250304  # of every match hash; a bundle of another seed reads another sketch
    user_kind: IdKind = "int"
    item_kind: IdKind = "int"
    item_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    context_features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("width", "head_width", "long_length", "short_length", "rank", "feature_width", "retrieved"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: wanted at least 1")
        if self.rank > self.long_length:
            raise ValueError(
                f"rank {self.rank} for {self.long_length} rows of history: wanted at most {self.long_length}"
            )
        if not self.mlp or any(width < 1 for width in self.mlp):
            raise ValueError(f"mlp is {self.mlp}: wanted one hidden layer at least, and widths of at least 1")
        for columns in ("item_features", "user_features", "context_features"):
            names = getattr(self, columns)
            if len(set(names)) < len(names):
                raise ValueError(f"{columns} is {names}: wanted each name once")
        if self.category is not None and self.category not in self.item_features:
            raise ValueError(
                f"category is {self.category!r}: wanted one of the item features, {list(self.item_features) or 'none'}"
            )
        if self.long_attention == "sim-hard" and not self.item_features:
            raise ValueError("sim-hard searches by category, and there is no item feature: add one, or use sim-soft")
        if self.long_attention == "lrea":
            self._check_blocks()
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads is {self.heads} for a width of {self.width}: wanted a divisor of it")
        check_cells(self.sketch_cells)

    def _check_blocks(self) -> None:
        if self.blocks in ROW_BLOCKS and self.form != "absorbed":
            raise ValueError(
                f'blocks = "{self.blocks}" learns no W_decomp, which form = "{self.form}" is about: '
                'wanted form = "absorbed", or blocks = "fixed" or "log"'
            )
        if self.blocks == "content" and not self.item_features:
            raise ValueError(
                'blocks = "content" orders rows by category, and there is no item feature: add one, or use "actual"'
            )

    @property
    def sketch_cells(self) -> tuple[int, ...]:
        """Cells per table of each hashed column: the item, then its features. Empty without match features."""
        return (self.item_cells, *(self.feature_cells for _ in self.item_features)) if self.match else ()

    @property
    def slots(self) -> int:
        """r where the model has a pair per user, else 0."""
        return self.rank if self.long_attention == "lrea" else 0

    @property
    def cacheable(self) -> bool:
        """Whether a user's long history becomes a record: other long attentions read all of it for every candidate."""
        return self.long_attention in ("lrea", "none")

    @property
    def category_index(self) -> int | None:
        """Place of the category among the item features; None where items have no feature."""
        if not self.item_features:
            return None
        return 0 if self.category is None else self.item_features.index(self.category)

    def column_seed(self, column: str | None) -> int:
        """Seed of one column's hashes (None: the item id), so that an id and a feature value don't share cells."""
        return self.hash_seed + (0 if column is None else 1 + self.item_features.index(column))


def read_config(values: Mapping[str, Any]) -> RankerConfig:
    """A configuration from plain values, as JSON or TOML give them. Raises ConfigError naming the option."""
    try:
        return read_options(RankerConfig, values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
