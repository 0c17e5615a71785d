"""A line of categories on which those that the same users go for are neighbours: what content blocks order rows by.

Two categories' count is the number of users with behaviours in both. The line is the spectral one: categories sorted by
the Fiedler vector (second eigenvector, over √degree) of the normalised Laplacian of those counts, which puts near each
other what is counted together (Shi and Malik, Normalized Cuts and Image Segmentation, PAMI 2000). A hundredth of the
mean count is added to every pair, so that the graph is connected and its second eigenvector one line.

Beyond MOST_CATEGORIES the rare ones follow by frequency, and of more than MOST_USERS users every so-manieth is counted,
so the cost is bounded: an eigenproblem of 4,000 took 20 s on one core.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.attention.lrea import LreaAttention
from model.log.behaviours import Int64s, InteractionLog
from model.log.encoding import EncodedLog
from model.ranker import Ranker
from model.vocabulary import FIRST_KNOWN

MOST_CATEGORIES = 4_000
MOST_USERS = 20_000
_SMOOTHING = 0.01  # of the mean count, added to every pair
_CHUNK_USERS = 1_000

Integers = npt.NDArray[np.integer[Any]]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


def order_content(ranker: Ranker, log: InteractionLog, encoded: EncodedLog, before: int) -> None:
    """Give content blocks their order, from behaviours of sessions that end before that time; else do nothing."""
    index = ranker.config.category_index
    if not isinstance(ranker.long, LreaAttention) or ranker.config.blocks != "content" or index is None:
        return
    counted = np.zeros(len(log.user_ids), dtype=bool)
    counted[np.linspace(0, len(counted) - 1, min(len(counted), MOST_USERS)).astype(np.int64)] = True
    rows = np.flatnonzero(log.in_history & (log.session_end < before) & counted[log.user])
    codes = encoded.items.codes[1 + torch.from_numpy(log.item[rows]).long(), index].numpy()
    places = category_order(log.user[rows], codes, ranker.sizes.item_features[index])
    ranker.long.set_category_order(torch.from_numpy(places))


def category_order(user: Integers, category: Int64s, categories: int) -> Float32s:
    """Place on the line by category code, float32 [categories].

    user, category: [n], of each behaviour. Categories without behaviours follow, by code; missing and unknown
    share the last place.
    """
    frequency = np.bincount(category, minlength=categories)[FIRST_KNOWN:]
    by_frequency = FIRST_KNOWN + np.argsort(-frequency, kind="stable")
    kept = by_frequency[: min(int(np.count_nonzero(frequency)), MOST_CATEGORIES)]
    line = kept[np.argsort(_fiedler(_users_of_both(user, category, kept)), kind="stable")] if len(kept) else kept
    places = np.full(categories, categories, dtype=np.float32)
    places[np.concatenate([line, by_frequency[len(kept) :]])] = np.arange(len(by_frequency))
    return places


def _users_of_both(user: Integers, category: Int64s, kept: Int64s) -> Float64s:
    """Users with behaviours in both of two kept categories, [C, C], a zero diagonal."""
    column = np.full(int(category.max()) + 1, -1)
    column[kept] = np.arange(len(kept))
    known = column[category] >= 0
    distinct = np.unique(user[known])
    row, column_of_row = np.searchsorted(distinct, user[known]), column[category[known]]
    counts = np.zeros((len(kept), len(kept)), dtype=np.float32)  # whole numbers, exact up to 2^24 users
    for start in range(0, len(distinct), _CHUNK_USERS):
        chunk = (row >= start) & (row < start + _CHUNK_USERS)
        has = np.zeros((_CHUNK_USERS, len(kept)), dtype=np.float32)
        has[row[chunk] - start, column_of_row[chunk]] = 1
        counts += has.T @ has
    np.fill_diagonal(counts, 0)
    return counts.astype(np.float64)


def _fiedler(counts: Float64s) -> Float64s:
    """Place of each category on the line; its direction is fixed by the entry that is farthest out."""
    if len(counts) < 3 or not counts.any():  # no line to speak of: by frequency
        return np.zeros(len(counts))
    weights = counts + _SMOOTHING * counts.mean()
    degree = weights.sum(axis=1)
    # The eigenvectors of I - D^(-1/2) A D^(-1/2) are those of D^(-1/2) A D^(-1/2), from the largest eigenvalue down.
    vectors = np.linalg.eigh(weights / np.sqrt(np.outer(degree, degree)))[1]
    places: Float64s = vectors[:, -2] / np.sqrt(degree)
    direction: float = np.sign(places[np.argmax(np.abs(places))])
    return places * direction
