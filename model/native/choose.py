"""The choice of rows by score on tensors, by the native kernels: the best of a history, and those of heads in turns.

Letters: U users, K candidates, A heads, N rows of history, k rows chosen, E 1 or K.
"""

import torch
from torch import Tensor

from model.native import kernels
from model.native.library import loaded


def serves(scores: Tensor) -> bool:
    """Whether these kernels may be asked about such scores. The first call may compile them, in a few seconds."""
    return kernels.serve(scores)


def best(scores_UKN: Tensor, eligible_UEN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each candidate the `count` <= N eligible rows of the largest score, best first, the first of equals first.

    scores: finite float32. Returns index int64 and found bool, both [U, K, k].
    """
    assert scores_UKN.ndim == 3, f"scores have {scores_UKN.ndim} axes, wanted 3"
    rows = scores_UKN.shape[-1]
    scores_UKN, penalties_UEN, share = _checked(scores_UKN, eligible_UEN, count)
    index, found = _chosen(scores_UKN, count)

    def some(begin: int, end: int) -> None:
        scratch = torch.empty(loaded().lrea_best_scratch(rows), dtype=torch.uint8)
        loaded().lrea_best(
            *(scores_UKN.data_ptr(), _address(penalties_UEN), begin, end, share, rows, count),
            *(index.data_ptr(), found.data_ptr(), scratch.data_ptr()),
        )

    kernels.on_threads(some, index.shape[0] * index.shape[1])
    return index, found


def turns(scores_UKAN: Tensor, eligible_UEN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each candidate `count` <= N eligible rows: each head's best, then each head's second best, each row once.

    scores: finite float32. Returns index int64 in that order and found bool, both [U, K, k].
    """
    heads, rows = scores_UKAN.shape[2:]
    scores_UKAN, penalties_UEN, share = _checked(scores_UKAN, eligible_UEN, count)
    index, found = _chosen(scores_UKAN, count)

    def some(begin: int, end: int) -> None:
        scratch = torch.empty(loaded().lrea_turns_scratch(rows, heads), dtype=torch.uint8)
        loaded().lrea_turns(
            *(scores_UKAN.data_ptr(), _address(penalties_UEN), begin, end, share, heads, rows, count),
            *(index.data_ptr(), found.data_ptr(), scratch.data_ptr()),
        )

    kernels.on_threads(some, index.shape[0] * index.shape[1])
    return index, found


def _checked(scores: Tensor, eligible_UEN: Tensor, count: int) -> tuple[Tensor, Tensor | None, int]:
    """Scores and penalties as the kernels read them, and how many candidates in a row share a penalty.

    No penalties where all rows are eligible.
    """
    users, candidates, rows = *scores.shape[:2], scores.shape[-1]
    shared, ours = (users, 1, rows), (users, candidates, rows)
    assert serves(scores), f"found {scores.dtype} on {scores.device}, wanted float32 on the CPU"
    assert eligible_UEN.shape in (shared, ours), f"who is eligible is {tuple(eligible_UEN.shape)}, wanted {shared}"
    assert 0 <= count <= rows < 2**31, f"{count} of {rows} rows"
    share = candidates if eligible_UEN.shape == shared else 1
    if bool(eligible_UEN.all()):
        return scores.contiguous(), None, share
    return scores.contiguous(), torch.zeros(eligible_UEN.shape).masked_fill_(~eligible_UEN, -torch.inf), share


def _address(penalties: Tensor | None) -> int | None:
    return None if penalties is None else penalties.data_ptr()


def _chosen(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:2], count)
    return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
