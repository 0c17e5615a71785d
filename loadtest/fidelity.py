"""Does the service answer with the trained model's scores? Compared on the logit, with the model in process.

    python -m loadtest.fidelity --url URL --store redis://… --bundle DIR --data DIR --as-of T [--users 500]

Two references: the model over the very record that the cache holds (the arithmetic alone, wanted within 1e-4), and
the model over the history itself (what storing in fewer bits costs besides, wanted within 3e-3 for float16). Ends with
one line of JSON, and with exit code 1 if a difference is larger than wanted.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import httpx
import numpy as np
import orjson
import redis
import torch
import typer

from loadtest.api_key import key_headers
from loadtest.client import ScoringClient, ServiceError, logits_of
from loadtest.population import Deck
from model.bundle import Bundle, load_bundle
from model.cache_format import Manifest, decode, manifest_key, record_key
from model.identifiers import Id
from model.log.behaviours import read_log
from model.log.user_batches import CacheableUsers, UserBatch
from model.ranker import ScoringInput, UserState

SAME_RECORD_TOLERANCE = 1e-4
# Storing a pair in fewer bits costs this much on the logit at the most (design: decision 5).
UNQUANTISED_TOLERANCE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 7e-2, "int8": 7e-2}
_BATCH_USERS = 64


@dataclass(frozen=True)
class Place:
    """Where the cache is, and what the service says it serves."""

    client: "redis.Redis"
    prefix: str
    model_id: str
    generation: str


def compare(
    client: ScoringClient, place: Place, bundle: Bundle, batches: Iterator[UserBatch], users: int, candidates: int
) -> dict[str, Any]:
    """Largest |Δlogit| against both references over the first `users` users, `candidates` candidates each."""
    deck, random = Deck(bundle.catalogue.items.values(), seed=0), Random(0)
    compared, same_record, unquantised = 0, 0.0, 0.0
    for batch in batches:
        slots, sketches = bundle.ranker.compress(batch.long), bundle.ranker.sketch(batch.long)
        for index, user_id in enumerate(batch.user_ids[: users - compared]):
            asked = deck.deal(candidates, random)
            answer = client.score(user_id, asked)
            if answer["user_state"] != "cached":
                raise ServiceError(
                    f"user {user_id!r} is {answer['user_state']}, wanted cached: build the cache as of T"
                )
            found = logits_of(answer["scores"])
            stored = _logits_of_record(place, bundle, user_id, asked)
            state = UserState(slots.keys_URd[index], slots.values_URd[index], sketches[index])
            tail, codes = batch.tail_ids[index], batch.user_codes[index]
            exact = _logits(bundle, state, tail, codes, asked)
            same_record = max(same_record, float(np.abs(found - stored).max()))
            unquantised = max(unquantised, float(np.abs(found - exact).max()))
            compared += 1
        if compared == users:
            break
    if compared == 0:  # or nothing would differ from nothing
        raise ServiceError("found no user with a behaviour as of T: give the data and the T of the cache")
    return {
        "users": compared,
        "candidates": candidates,
        "max_abs_diff": same_record,
        "max_abs_diff_unquantised": unquantised,
    }


def _manifest(place: Place) -> Manifest:
    key = manifest_key(place.prefix, place.model_id, place.generation)
    data = place.client.get(key)
    if not isinstance(data, bytes):
        raise ServiceError(f"found no key {key}: give the service's --store and --key-prefix")
    return Manifest.from_json(data)


def _logits_of_record(place: Place, bundle: Bundle, user_id: Id, asked: list[Id]) -> np.ndarray[Any, Any]:
    key = record_key(place.prefix, place.model_id, place.generation, user_id)
    data = place.client.get(key)
    if not isinstance(data, bytes):
        raise ServiceError(f"found no key {key}: did the cache change during the comparison?")
    record = decode(
        data, model_id=place.model_id, generation=place.generation, user_id=user_id, shape=bundle.record_shape
    )
    codes = torch.from_numpy(record.user_codes.astype(np.int64))
    return _logits(bundle, bundle.state_from_record(record), list(record.tail_ids), codes, asked)


def _logits(
    bundle: Bundle, state: UserState, tail: list[Id], user_codes: torch.Tensor, asked: list[Id]
) -> np.ndarray[Any, Any]:
    short, candidates = bundle.short_window(tail), bundle.catalogue.encode(asked)
    request = ScoringInput(state, short, user_codes, bundle.context_features.encode({}), candidates)
    scores: np.ndarray[Any, Any] = bundle.ranker.score(request).numpy().astype(np.float64)
    return scores


def main(
    url: Annotated[str, typer.Option(help="where the service answers")],
    store: Annotated[str, typer.Option(envvar="LREA_STORE_URL", help="the service's store")],
    bundle: Annotated[Path, typer.Option(help="the served bundle")],
    data: Annotated[Path, typer.Option(help="the data folder that the cache was built from")],
    as_of: Annotated[int | None, typer.Option(help="T; not given: the one the cache was built as of")] = None,
    users: Annotated[int, typer.Option(min=1)] = 500,
    candidates: Annotated[int, typer.Option(min=1)] = 100,
    key_prefix: Annotated[str, typer.Option(envvar="LREA_KEY_PREFIX")] = "lrea",
) -> None:
    """Compare HTTP scores with the model in process."""
    try:
        loaded, log = load_bundle(bundle), read_log(data)
        with ScoringClient(url, key_headers(os.environ)) as client, redis.Redis.from_url(store) as connection:
            served = client.model()
            if served["model_id"] != loaded.model_id:
                raise ServiceError(
                    f"the service serves {served['model_id']}, --bundle is {loaded.model_id}: name that one"
                )
            if served["generation"] is None:
                raise ServiceError("the service serves no generation: build the cache first")
            place = Place(connection, key_prefix, loaded.model_id, served["generation"])
            manifest = _manifest(place)
            if as_of is not None and as_of != manifest.as_of:
                raise ServiceError(f"the cache was built as of {manifest.as_of}, --as-of is {as_of}: leave it out")
            batches = CacheableUsers(log, loaded, manifest.as_of).batches(_BATCH_USERS)
            result = compare(client, place, loaded, batches, users, candidates)
    except (ValueError, httpx.HTTPError, redis.RedisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(orjson.dumps(result).decode())
    within = result["max_abs_diff_unquantised"] <= UNQUANTISED_TOLERANCE[manifest.precision]
    if result["max_abs_diff"] > SAME_RECORD_TOLERANCE or not within:
        print("error: the service does not answer with the trained model's scores", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
