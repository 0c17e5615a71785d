"""From a request of valid types to work for a batch: checked against the model and the limits, ids looked up.

`check` is cheap and runs where the body was read; `prepare` may look up thousands of ids, and runs on a thread then.
All that can be wrong with one request is found here, so that it never fails the batch it would have shared. Integers
without features of their own can only be known or unknown: they are looked up with those of the whole batch
(scorer.py): in a process that does much else, it takes longer to come to a look-up than to do it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from model.cache_format import user_in_key
from model.catalogue import Items
from model.identifiers import Id, IdKind
from model.vocabulary import Int64s
from service.active import ActiveModel
from service.errors import FieldError, InvalidRequest
from service.schemas import Behaviour
from service.timing import Stages
from service.users.state import Recent, Row, User, from_rows, item_ids, newest

T = TypeVar("T")
JSON_TYPE: dict[IdKind, type] = {"int": int, "string": str}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_candidates: int
    max_history: int


class Asked(Protocol):
    """One request as its route read it, of valid types; the fields mean what ScoreRequest says."""

    @property
    def user_id(self) -> Id: ...
    @property
    def candidates(self) -> Sequence[Id] | Int64s: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def recent_items(self) -> Sequence[Row]: ...
    @property
    def history(self) -> Sequence[Row] | None: ...
    @property
    def context(self) -> Mapping[str, Id | None] | None: ...
    @property
    def candidate_features(self) -> Mapping[str, Sequence[Id | None]] | None: ...
    @property
    def timeout_ms(self) -> int | None: ...


class CheckedRequest(NamedTuple):
    """A request that `model` can answer, but for columns that it may lack; of its rows, what can count."""

    request: Asked
    model: ActiveModel
    at: str  # JSON pointer of the request within the body
    recent: Recent
    history: Sequence[Id] | None  # its newest L + S


@dataclass(eq=False)
class ScoringJob:
    """One request, ready to be scored by the model that was active when it came."""

    model: ActiveModel
    user_id: Id
    candidate_ids: Sequence[Id] | Int64s
    size: int  # candidates, B
    candidates: Items | None  # [B], on the CPU; None: looked up with those of the whole batch
    context_codes: Tensor  # int64 [Fc], on the CPU
    recent: Recent
    user: User | None  # from the request's own history; None: look the record up
    deadline: float  # by time.monotonic()
    stages: Stages = field(default_factory=Stages)

    @property
    def group(self) -> object:
        return self.model

    def waited(self, seconds: float) -> None:
        self.stages.add("queue", seconds)


def check(request: Asked, model: ActiveModel, limits: Limits, at: str = "") -> CheckedRequest:
    """Cut the rows to what counts. `at` is the JSON pointer of the request within the body.

    Raises InvalidRequest if this model cannot answer; also for rows that would have been cut.
    """
    errors = tuple(FieldError(at + pointer, detail) for pointer, detail in _mistakes(request, model, limits))
    if errors:
        raise InvalidRequest.of(errors)
    history = None if request.history is None else item_ids(newest(request.history, model))
    return CheckedRequest(request, model, at, Recent.of(request.recent_items), history)


def prepare(checked: CheckedRequest, deadline: float) -> ScoringJob:
    """Look up everything that the request names. Raises InvalidRequest for columns that the model lacks.

    deadline: when the answer is of no more use, by time.monotonic().
    """
    request, model = checked.request, checked.model
    bundle = model.bundle
    candidates = None
    if not looked_up_together(checked):
        candidates = _encoded(
            checked.at + "/candidate_features",
            lambda: bundle.catalogue.encode(request.candidates, request.candidate_features),
        )
    context = _encoded(checked.at + "/context", lambda: bundle.context_features.encode(request.context or {}))
    return ScoringJob(
        model=model,
        user_id=request.user_id,
        candidate_ids=request.candidates,
        size=len(request.candidates),
        candidates=candidates,
        context_codes=context,
        recent=checked.recent,
        user=None if checked.history is None else from_rows(model, checked.history, checked.recent),
        deadline=deadline,
    )


def looked_up_together(checked: CheckedRequest) -> bool:
    """Whether its candidates are looked up with those of its batch."""
    return checked.model.bundle.item_kind == "int" and not checked.request.candidate_features


def _mistakes(request: Asked, model: ActiveModel, limits: Limits) -> Iterator[tuple[str, str]]:
    bundle = model.bundle
    yield from user_mistakes(request.user_id, model)
    yield from _list_mistakes("/candidates", request.candidates, bundle.item_kind, limits.max_candidates)
    if request.recent_items:
        yield from _list_mistakes("/recent_items", request.recent_items, bundle.item_kind, limits.max_history)
    if request.history:
        yield from _list_mistakes("/history", request.history, bundle.item_kind, limits.max_history)


def user_mistakes(user_id: Id, model: ActiveModel) -> Iterator[tuple[str, str]]:
    """What is wrong with a user id, as (JSON pointer, detail)."""
    kind = model.bundle.user_kind
    if not isinstance(user_id, JSON_TYPE[kind]):
        yield "/user_id", f"is {_kind_of(user_id)}, and this model's user ids are of type {kind}: send it as that"
        return
    try:
        user_in_key(user_id)
    except ValueError as error:
        yield "/user_id", str(error)


def _list_mistakes(name: str, rows: Sequence[Row] | Int64s, kind: IdKind, limit: int) -> Iterator[tuple[str, str]]:
    if len(rows) > limit:
        yield name, f"has {len(rows)} rows, at most {limit} are taken: split the request"
        return
    wanted = JSON_TYPE[kind]
    # 30 µs for 4,000 candidates, where the loop below takes ten times that.
    types = {int} if isinstance(rows, np.ndarray) else set(map(type, rows))
    if Behaviour in types:
        types = types - {Behaviour} | {type(row.item_id) for row in rows if type(row) is Behaviour}
    if types <= {wanted}:
        return
    for index, row in enumerate(rows):
        item_id = row.item_id if isinstance(row, Behaviour) else row
        if not isinstance(item_id, wanted):
            where = f"{name}/{index}/item_id" if isinstance(row, Behaviour) else f"{name}/{index}"
            yield where, f"is {_kind_of(item_id)}, and this model's item ids are of type {kind}: send it as that"
            return


def _kind_of(value: Id) -> str:
    return "a string" if isinstance(value, str) else "an integer"


def _encoded(pointer: str, encode: Callable[[], T]) -> T:
    """The model's own words for a column or value it does not have are for the caller."""
    try:
        return encode()
    except ValueError as error:
        raise InvalidRequest.at(pointer, str(error)) from error
