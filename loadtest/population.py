"""Who asks and what for: the users that the published cache holds, and candidates from its bundle's catalogue.

Real traffic is skewed and comes from users who have a record, so users are read from the store (SCAN over the active
generation's keys) and drawn by Zipf's law. Knows nothing of HTTP or of Locust.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from random import Random
from typing import Generic, TypeVar

import redis

from model.cache_format import ActivePointer, Manifest, active_key, generation_prefix, manifest_key, user_from_key
from model.identifiers import Id

SCAN_COUNT = 1000  # keys per round trip: a few hundred microseconds of the server's time
STORE_TIMEOUT_S = 5.0

T = TypeVar("T")


class PopulationError(ValueError):
    """There is nothing to load the service with; the message says what to build."""


@dataclass(frozen=True)
class Population:
    """The users of the published generation, in the store's own order (which is as good as none)."""

    model_id: str
    generation: str
    user_ids: tuple[Id, ...]


def read_population(url: str, prefix: str, limit: int) -> Population:
    """The published generation and up to `limit` of its users.

    Raises PopulationError if the store cannot be asked, has nothing published under `prefix`, or holds no record of it.
    """
    try:
        with redis.Redis.from_url(
            url, socket_timeout=STORE_TIMEOUT_S, socket_connect_timeout=STORE_TIMEOUT_S, decode_responses=False
        ) as client:
            return _population(client, prefix, limit)
    except (redis.RedisError, OSError) as error:
        raise PopulationError(f"the store could not be asked ({type(error).__name__}): is it running?") from error


def _population(client: "redis.Redis", prefix: str, limit: int) -> Population:
    pointer = _read(client, active_key(prefix))
    if pointer is None:
        raise PopulationError(
            f"found no key {active_key(prefix)}: publish a cache first (python -m cache_builder build)"
        )
    published = ActivePointer.from_json(pointer).current
    place = (prefix, published.model_id, published.generation)
    manifest = _read(client, manifest_key(*place))
    if manifest is None:
        raise PopulationError(f"found no key {manifest_key(*place)}: the published generation is gone, build it again")
    kind = Manifest.from_json(manifest).user_kind
    keys = islice(_record_keys(client, generation_prefix(*place)), limit)
    # SCAN may return a key twice while the server resizes its tables.
    user_ids = tuple(dict.fromkeys(user_from_key(key, *place, kind) for key in keys))
    if not user_ids:
        raise PopulationError(f"generation {published.generation} holds no record: build it again")
    return Population(published.model_id, published.generation, user_ids)


def _read(client: "redis.Redis", key: str) -> bytes | None:
    value = client.get(key)
    return value if isinstance(value, bytes) else None


def _record_keys(client: "redis.Redis", head: str) -> Iterator[str]:
    pattern = re.sub(r"([*?\[\]\\])", r"\\\1", head) + "u:*"  # a prefix may hold what SCAN takes for a wildcard
    for key in client.scan_iter(match=pattern, count=SCAN_COUNT):
        yield key.decode()


class Zipf(Generic[T]):
    """Draws from `choices`, the k-th with a weight of 1 / k**exponent. Which one is k-th is shuffled by `seed`."""

    def __init__(self, choices: Sequence[T], exponent: float, seed: int) -> None:
        """Raises ValueError for no choices or a negative exponent (0 draws evenly)."""
        if not choices or exponent < 0:
            raise ValueError(f"found {len(choices)} choices and exponent {exponent}, wanted some and 0 or more")
        self.choices = list(choices)
        Random(seed).shuffle(self.choices)
        self._cumulative = list(accumulate((rank + 1) ** -exponent for rank in range(len(self.choices))))

    def draw(self, random: Random) -> T:
        """One choice."""
        place = bisect_left(self._cumulative, random.random() * self._cumulative[-1])
        return self.choices[min(place, len(self.choices) - 1)]  # rounding may point one past the end


class Deck(Generic[T]):
    """Deals lists of distinct items, each item as often as any other.

    A hand is a slice of one shuffled deck, so hands overlap in runs. Drawing 1,000 of 26,000 anew costs the client half
    a millisecond, as much as the service needs to score them.
    """

    def __init__(self, items: Sequence[T], seed: int) -> None:
        """Raises ValueError for no items."""
        if not items:
            raise ValueError("found no items, wanted some: is this the catalogue of a trained bundle?")
        self._items = list(items)
        Random(seed).shuffle(self._items)

    def deal(self, size: int, random: Random) -> list[T]:
        """`size` distinct items, fewer only if the deck has fewer."""
        start, size = random.randrange(len(self._items)), min(size, len(self._items))
        head = self._items[start : start + size]
        return head + self._items[: size - len(head)]
