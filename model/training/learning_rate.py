"""The choice of a learning rate, on held-out time before T and nothing later."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RateChoice:
    """The best rate and what each reached."""

    best: float
    auc_of_rate: dict[float, float]  # validation AUC, in the order tried; nan where the training diverged


def choose_learning_rate(rates: Sequence[float], validate: Callable[[float], float]) -> RateChoice:
    """Try every rate: `validate` trains with it and returns the AUC on held-out time. Of equals the smaller rate wins.

    Raises ValueError for no rate, a rate twice, one that is not above 0, or when no rate reaches any AUC.
    """
    check_learning_rates(rates)
    auc_of_rate = {rate: validate(rate) for rate in rates}
    reached = {rate: auc for rate, auc in auc_of_rate.items() if not math.isnan(auc)}
    if not reached:
        raise ValueError(f"no learning rate of {list(rates)} led anywhere: the training diverged, try smaller ones")
    return RateChoice(max(sorted(reached), key=reached.__getitem__), auc_of_rate)


def check_learning_rates(rates: Sequence[float]) -> None:
    """Raise ValueError unless there is a rate, each is finite and above 0, and none is there twice."""
    if not rates:
        raise ValueError("no learning rates to choose from: name at least one")
    if len(set(rates)) < len(rates):
        raise ValueError(f"learning rates {list(rates)}: wanted each once")
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"learning rate {rate}: wanted more than 0, and finite")
