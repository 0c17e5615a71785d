"""What is asked of a comparison, as values and as the command line gives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from model.training.learning_rate import check_learning_rates

Value = TypeVar("Value")
# Of a training, where the recipe does not say: with all methods and seeds, hours are minutes.
MAX_POSITIVES = 150_000


@dataclass(frozen=True)
class Comparison:
    """What is asked for. Raises ValueError where it cannot be."""

    as_of: int | None = None  # T; None: the newest tenth of the labelled rows is judged
    until: int | None = None
    negatives: int = 4
    names: Sequence[str] | None = None  # None: every method, and every model that the recipe names
    seeds: int = 2  # three take 500,000 interactions past half an hour on two cores
    ranks: Sequence[int] = ()
    penalties: Sequence[float] = ()
    rates: Sequence[float] = ()  # none: no search
    reference: str | None = None  # None: lrea_match, if it is there
    workers: int | None = None  # None: one per core on a CPU, else one
    keep_bundles: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: wanted at least 1")
        for weight in self.penalties:
            if not weight >= 0:
                raise ValueError(f"lambda {weight}: wanted 0 or more")
        if self.rates:
            check_learning_rates(self.rates)


def read_list(option: str, text: str | None, read: Callable[[str], Value]) -> list[Value]:
    """Values of `--option A,B,…`; none where it was not given. Raises ValueError naming the option."""
    if text is None:
        return []
    try:
        return [read(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}: wanted {read.__name__}s between commas") from error
