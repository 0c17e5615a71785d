"""What a record must look like to belong to a bundle: its sizes, and the kind of its item ids."""

from dataclasses import dataclass

from model.identifiers import IdKind

SKETCH_TABLES = 2  # of each hashed column
_MAX_U16, _MAX_U32 = 2**16 - 1, 2**32 - 1


@dataclass(frozen=True)
class RecordShape:
    """The sizes that a bundle fixes for all of its records.

    rank 0 means that the model has no pair; no `sketch_cells`, that it has no match sketch; no `user_features`, that
    records carry no user codes.
    """

    long_length: int  # L, rows
    short_length: int  # S, rows
    width: int  # d
    rank: int  # r
    sketch_cells: tuple[int, ...]  # cells per table and hashed column
    item_kind: IdKind
    user_features: int

    def __post_init__(self) -> None:
        for name, value, lowest, highest in (
            ("long_length", self.long_length, 0, _MAX_U32),
            ("short_length", self.short_length, 0, _MAX_U32),
            ("width", self.width, 1, _MAX_U16),
            ("rank", self.rank, 0, _MAX_U16),
            ("user_features", self.user_features, 0, _MAX_U32),
            ("sketch columns", len(self.sketch_cells), 0, _MAX_U16),
            *(("sketch cells", cells, 1, _MAX_U32) for cells in self.sketch_cells),
        ):
            if not lowest <= value <= highest:
                raise ValueError(f"{name} is {value}, wanted {lowest} to {highest}: correct the model's configuration")

    @property
    def sketch_size(self) -> int:
        """Bytes of all tables together."""
        return sketch_width(self.sketch_cells)


def sketch_width(cells: tuple[int, ...]) -> int:
    """M: cells (and bytes) of one user's match sketch, for `cells` per table and column."""
    return SKETCH_TABLES * sum(cells)
