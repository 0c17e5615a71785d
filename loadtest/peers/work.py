"""What every peer does for a request, so that they differ in nothing but the server around it.

    read the body -> GET or MGET the user's record -> decode it -> encode the candidates -> forward -> answer

The read of the store is the peer's own, in its server's style; the rest is here. It runs in the peers' environments,
which have what `model` needs and not what the service needs.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from redis import Redis
from torch import Tensor

from model.bundle import load_bundle
from model.cache_format import ActivePointer, active_key, decode, record_key
from model.ranker import ScoringInput

Stored = bytes | str | None  # what redis-py may give for a key
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where the model and its cache are; `null` leaves the forward out and nothing else."""

    bundles: str
    store: str
    prefix: str
    null: bool

    def to_json(self) -> str:
        """As `of_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> "Place":
        """The place that `to_json` wrote."""
        return cls(**json.loads(text))


class Work:
    """One loaded model and the generation that was published when it was loaded."""

    def __init__(self, place: Place) -> None:
        torch.set_num_threads(1)
        with Redis.from_url(place.store) as client:
            pointer = client.get(active_key(place.prefix))
        assert isinstance(pointer, bytes), "the benchmark publishes before it starts servers"
        published = ActivePointer.from_json(pointer).current
        self._place = place
        self._generation = published.generation
        self._bundle = load_bundle(Path(place.bundles) / published.model_id)
        self._no_context = self._bundle.context_features.encode({})

    def key(self, user_id: int) -> str:
        """The key of a user's record."""
        return record_key(self._place.prefix, self._bundle.model_id, self._generation, user_id)

    def scoring_input(self, user_id: int, candidates: Sequence[int], data: Stored) -> ScoringInput:
        """A request, encoded. data: the user's record as stored. Raises ValueError if there is none or it is broken."""
        if not isinstance(data, bytes):
            raise ValueError(f"user {user_id} has no record: ask for a user of the published cache")
        bundle = self._bundle
        record = decode(
            data,
            model_id=bundle.model_id,
            generation=self._generation,
            user_id=user_id,
            shape=bundle.record_shape,
        )
        return ScoringInput(
            state=bundle.state_from_record(record),
            short=bundle.short_window(record.tail_ids),
            user_codes=torch.from_numpy(record.user_codes).to(torch.int64),
            context_codes=self._no_context,
            candidates=bundle.catalogue.encode(candidates),
        )

    @torch.no_grad()
    def scores(self, inputs: Sequence[ScoringInput]) -> list[Scores]:
        """Probabilities float32 [B] of each request's candidates, in one forward."""
        return [torch.sigmoid(logits_B).numpy() for logits_B in self.logits(inputs)]

    def logits(self, inputs: Sequence[ScoringInput]) -> list[Tensor]:
        """The forward: the one line that a faster scorer replaces."""
        return zeros(inputs) if self._place.null else self._bundle.serving.score_many(inputs)


def zeros(inputs: Sequence[ScoringInput]) -> list[Tensor]:
    """What the null scorer answers: a logit of 0 per candidate, float32 [B] per request."""
    return [torch.zeros(len(request.candidates.rows)) for request in inputs]


@dataclass(frozen=True)
class Asked:
    """What a peer is started with."""

    place: Place
    port: int
    one_by_one: bool  # the server's batching is off


def read_command_line() -> Asked:
    """The command line of the peers that are started as modules."""
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Place.of_json)
    parser.add_argument("port", type=int)
    parser.add_argument("--one-by-one", action="store_true")
    return Asked(**vars(parser.parse_args()))
