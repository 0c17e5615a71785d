"""What a raw log leaves to whoever reads it: exact repeats, and which rows are one sitting."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def drop_repeats(table: pa.Table) -> tuple[pa.Table, int]:
    """The table without rows that repeat another in every column, and how many those were; first ones stay in place."""
    kept = table.group_by(table.column_names, use_threads=False).aggregate([])
    return kept, table.num_rows - kept.num_rows


def sessions_by_gap(user: npt.NDArray[np.int64], timestamp: npt.NDArray[np.int64], gap: int) -> npt.NDArray[np.int64]:
    """Session number of each row, int64 [n]: a user's session ends where no row follows for longer than `gap`.

    Rows are sorted by user, then time.
    """
    starts = (np.diff(user) != 0) | (np.diff(timestamp) > gap)
    return np.concatenate([[0], np.cumsum(starts)])
