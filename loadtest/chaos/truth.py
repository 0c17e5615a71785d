"""What the model in this process answers to a fixed set of questions: every answer of the service is held against it.

Questions are all pairs of some users and some lists of candidates, so that an answer which is another user's can be
told from one that is merely wrong. The reference is `Ranker.score`, not the faster form that the service computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from redis import Redis

from loadtest.client import logits_of
from loadtest.in_process import input_of_history, input_of_record
from model.bundle import Bundle
from model.cache_format import UserRecord, decode, record_key

TOLERANCE = 1e-4  # on the logit
WRONG_USER = "another user's answer"  # how a fault begins that must never be
CACHED, EMPTY = "cached", "empty"

Logits = npt.NDArray[np.float64]


class Question(NamedTuple):
    """One user, and the number of a list of candidates."""

    user_id: int
    listed: int


class Truth:
    """Logits by model, generation and user state. Every user has a record in every generation that was added."""

    def __init__(self, user_ids: Sequence[int], lists: Sequence[Sequence[int]], strangers: Sequence[int] = ()) -> None:
        """strangers: users without a record, who are asked about, too."""
        self.user_ids = user_ids
        self.lists = lists
        self.strangers = strangers
        self._row_of = {user_id: row for row, user_id in enumerate(user_ids)}
        self._cached: dict[tuple[str, str], list[Logits]] = {}  # [U, B] of each list
        self._empty: dict[str, list[Logits]] = {}  # [B] of each list

    def add(self, bundle: Bundle, generation: str, records: Sequence[UserRecord]) -> None:
        """From now on answers of this model and generation are right, too. records: one per user, in their order."""
        rows = [[_logits(bundle, record, candidates) for record in records] for candidates in self.lists]
        self._cached[bundle.model_id, generation] = [np.stack(of_list) for of_list in rows]
        self._empty[bundle.model_id] = [_logits(bundle, None, candidates) for candidates in self.lists]

    def add_stored(self, url: str, prefix: str, bundle: Bundle, generation: str) -> None:
        """`add`, with the records that the store holds now. Raises ValueError for a user without a good one."""
        with Redis.from_url(url, protocol=2) as client:
            records = [_read(client, prefix, bundle, generation, user_id) for user_id in self.user_ids]
        self.add(bundle, generation, records)

    def questions(self) -> list[Question]:
        """All of them; neighbours are of different users."""
        user_ids = [*self.user_ids, *self.strangers]
        return [Question(user_id, listed) for listed in range(len(self.lists)) for user_id in user_ids]

    def logits(self, model_id: str, generation: str | None, state: str, question: Question) -> Logits | None:
        """The right ones, [B]; None if nobody may answer so."""
        row = self._row_of.get(question.user_id)
        if state == CACHED and row is not None and generation is not None and (model_id, generation) in self._cached:
            logits: Logits = self._cached[model_id, generation][question.listed][row]
            return logits
        if state == EMPTY and model_id in self._empty:
            return self._empty[model_id][question.listed]
        return None

    def fault_of(self, question: Question, answer: object) -> str | None:
        """What is wrong with an answer of /v1/score, or None."""
        if not isinstance(answer, Mapping):
            return f"wanted an object, found {answer!r:.80}"
        if answer.get("user_id") != question.user_id:
            return f"{WRONG_USER}: asked for {question.user_id}, it says {answer.get('user_id')!r}"
        said = (answer.get("model_id"), answer.get("generation"), answer.get("user_state"))
        return self.fault_of_scores(question, *said, answer.get("degraded"), answer.get("scores"))

    def fault_of_scores(
        self, question: Question, model_id: Any, generation: Any, state: Any, degraded: Any, scores: Any
    ) -> str | None:
        """The same of an answer in another form. scores: probabilities in the order of the candidates."""
        wanted = self.logits(model_id, generation, state, question)
        if wanted is None:
            return f"model {model_id!r}, generation {generation!r}, user state {state!r}: wanted one that was published"
        if state == EMPTY and not degraded and question.user_id not in self.strangers:
            return f"user {question.user_id} has a record, found {EMPTY} without a reason"
        try:
            found = logits_of(scores)
        except (TypeError, ValueError):
            return f"scores: wanted numbers, found {scores!r:.80}"
        if found.shape != wanted.shape:
            return f"scores: wanted {len(wanted)}, found {found.shape}"
        if _near(found, wanted):
            return None
        return self._whose(found, question) or f"scores: {_distance(found, wanted):.1e} from the model's on the logit"

    def least_distance(self) -> float:
        """Between any two answers to one question that must not be taken for each other: of two users, of two models.

        More than twice TOLERANCE, or another user's answer could pass for the right one.
        """
        return min(map(self._least_distance, range(len(self.lists))))

    def _least_distance(self, listed: int) -> float:
        cached = [lists[listed] for lists in self._cached.values()]
        rows = np.concatenate([*cached, [lists[listed] for lists in self._empty.values()]])
        return min(float(np.abs(rows[at + 1 :] - rows[at]).max(axis=1).min()) for at in range(len(rows) - 1))

    def _whose(self, found: Logits, question: Question) -> str | None:
        """Whose scores these are instead, if they are anybody's."""
        for (model_id, generation), lists in self._cached.items():
            for user_id, wanted in zip(self.user_ids, lists[question.listed], strict=True):
                if _near(found, wanted):
                    return _description(question, user_id, model_id, generation)
        models = [model_id for model_id, lists in self._empty.items() if _near(found, lists[question.listed])]
        return f"scores are those of an empty user, model {models[0]}" if models else None


def _description(question: Question, user_id: int, model_id: str, generation: str) -> str:
    if user_id == question.user_id:
        return f"scores are those of his record, model {model_id}, generation {generation}"
    return f"{WRONG_USER}: asked for {question.user_id}, the scores are those of {user_id}"


def _near(found: Logits, wanted: Logits) -> bool:
    return found.shape == wanted.shape and _distance(found, wanted) <= TOLERANCE


def _distance(found: Logits, wanted: Logits) -> float:
    return float(np.abs(found - wanted).max(initial=0.0))


def _logits(bundle: Bundle, record: UserRecord | None, candidates: Sequence[int]) -> Logits:
    if record is None:
        request = input_of_history(bundle, [], candidates)
    else:
        request = input_of_record(bundle, record, candidates)
    with torch.no_grad():
        return bundle.ranker.score(request).double().numpy()


def _read(client: "Redis", prefix: str, bundle: Bundle, generation: str, user_id: int) -> UserRecord:
    data = client.get(record_key(prefix, bundle.model_id, generation, user_id))
    if not isinstance(data, bytes):
        raise ValueError(f"user {user_id} has no record of model {bundle.model_id}, generation {generation}")
    return decode(data, model_id=bundle.model_id, generation=generation, user_id=user_id, shape=bundle.record_shape)
