"""AUC and GAUC, exactly: ties count half."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int8]


def auc(labels: Labels, scores: Floats) -> float:
    """Probability that a positive scores above a negative. NaN where there are not both."""
    aucs, _ = group_aucs(np.zeros(len(labels), dtype=np.int64), labels, scores)
    return float(aucs[0]) if len(aucs) else float("nan")


def gauc(groups: npt.NDArray[np.int64], labels: Labels, scores: Floats) -> float:
    """Mean AUC over groups, weighted by their samples; groups of a single class are left out.

    Source: Zhu et al., Optimized Cost per Click in Taobao Display Advertising, KDD 2017, with requests as groups.
    """
    aucs, sizes = group_aucs(groups, labels, scores)
    both = ~np.isnan(aucs)
    return float(np.average(aucs[both], weights=sizes[both])) if both.any() else float("nan")


def counted_groups(groups: npt.NDArray[np.int64], labels: Labels) -> int:
    """How many groups GAUC counts: those of both classes."""
    positive = labels == 1
    return len(np.intersect1d(groups[positive], groups[~positive]))


def group_aucs(groups: npt.NDArray[np.int64], labels: Labels, scores: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """AUC of each group in rising order of its number (NaN for a single class), and its samples."""
    if not len(groups):
        return np.empty(0), np.empty(0, dtype=np.int64)
    order = np.lexsort((scores, groups))
    group, label, score = groups[order], labels[order] == 1, scores[order]
    new_group = np.append(True, group[1:] != group[:-1])
    new_value = new_group | np.append(True, score[1:] != score[:-1])
    ranks = _mean_ranks(np.flatnonzero(new_value), len(score))
    starts = np.flatnonzero(new_group)
    sizes = np.diff(np.append(starts, len(score)))
    positives = np.add.reduceat(label.astype(np.int64), starts)
    rank_sums = np.add.reduceat(np.where(label, ranks, 0.0), starts) - positives * starts  # ranks within the group
    pairs = positives * (sizes - positives)
    wins = rank_sums - positives * (positives + 1) / 2
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan), sizes


def _mean_ranks(starts: npt.NDArray[np.int64], count: int) -> Floats:
    """1-based rank of each sorted row; rows of one value share their mean rank."""
    sizes = np.diff(np.append(starts, count))
    return np.repeat(starts + (sizes + 1) / 2, sizes)
