"""Users come from the store's published generation, whatever else lies there; draws follow their law."""

from collections import Counter
from random import Random

import pytest
import redis

from loadtest.population import Deck, PopulationError, Zipf, read_population
from model.cache_format import (
    FORMAT_VERSION,
    ActivePointer,
    Manifest,
    Published,
    RecordShape,
    active_key,
    manifest_key,
    record_key,
)
from model.identifiers import Id, IdKind

MODEL = "0123456789ab"


def publish(url: str, prefix: str, generation: str, user_ids: list[Id], kind: IdKind) -> None:
    """Write keys as the builder does; the records' bytes do not matter here."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model_id=MODEL,
        generation=generation,
        users=len(user_ids),
        record_bytes=len(user_ids),
        precision="float16",
        as_of=None,
        built_at_ms=1,
        user_kind=kind,
        shape=RecordShape(4, 2, 2, 1, (), "int", 0),
        source={},
        versions={},
    )
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        for user_id in user_ids:
            pipeline.set(record_key(prefix, MODEL, generation, user_id), b"x")
        pipeline.set(manifest_key(prefix, MODEL, generation), manifest.to_json())
        pipeline.set(active_key(prefix), ActivePointer(Published(MODEL, generation), None, 1).to_json())
        pipeline.execute()


@pytest.mark.parametrize(
    ("kind", "user_ids"),
    [("int", [-1, 0, *range(10, 3000)]), ("string", ["a", "A b/ü", "u:1", "*", "7"])],
)
def test_reads_the_users_of_the_published_generation(
    store_url: str, key_prefix: str, kind: IdKind, user_ids: list[Id]
) -> None:
    publish(store_url, key_prefix, "old", [1001], kind="int")
    publish(store_url, key_prefix + ":other", "new", [1002], kind="int")
    publish(store_url, key_prefix, "new", user_ids, kind)

    population = read_population(store_url, key_prefix, limit=100_000)

    assert (population.model_id, population.generation) == (MODEL, "new")
    assert len(population.user_ids) == len(user_ids)
    assert set(population.user_ids) == set(user_ids)


def test_stops_at_the_limit(store_url: str, key_prefix: str) -> None:
    publish(store_url, key_prefix, "new", list(range(500)), kind="int")

    assert len(read_population(store_url, key_prefix, limit=20).user_ids) == 20


def test_a_prefix_is_not_a_pattern(store_url: str, key_prefix: str) -> None:
    publish(store_url, key_prefix + "ab", "new", [1], kind="int")
    publish(store_url, key_prefix + "[a]*", "new", [2], kind="int")

    assert read_population(store_url, key_prefix + "[a]*", limit=10).user_ids == (2,)


def test_says_what_to_build(store_url: str, key_prefix: str) -> None:
    with pytest.raises(PopulationError, match=f"found no key {key_prefix}:active: publish a cache first"):
        read_population(store_url, key_prefix, limit=10)

    publish(store_url, key_prefix, "new", [], kind="int")
    with pytest.raises(PopulationError, match="generation new holds no record: build it again"):
        read_population(store_url, key_prefix, limit=10)

    with redis.Redis.from_url(store_url) as client:
        client.delete(manifest_key(key_prefix, MODEL, "new"))
    with pytest.raises(PopulationError, match="manifest: the published generation is gone"):
        read_population(store_url, key_prefix, limit=10)


def test_an_unreachable_store_is_named_without_its_password() -> None:
    with pytest.raises(PopulationError, match=r"the store could not be asked \(ConnectionError\)") as caught:
        read_population("redis://:secret@127.0.0.1:1/0", "lrea", limit=10)
    assert "secret" not in str(caught.value)


def test_zipf_draws_by_rank() -> None:
    zipf, random = Zipf(range(100), 1.0, seed=3), Random(0)

    drawn = Counter(zipf.draw(random) for _ in range(50_000))

    harmonic = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 5, 20):
        share = drawn[zipf.choices[rank - 1]] / 50_000
        assert share == pytest.approx(1 / rank / harmonic, rel=0.1), f"rank {rank}"
    assert zipf.choices != list(range(100)), "the hot users must not be those with the smallest ids"
    assert zipf.choices == Zipf(range(100), 1.0, seed=3).choices


def test_zipf_with_exponent_zero_is_even() -> None:
    zipf, random = Zipf(["a", "b"], 0.0, seed=0), Random(0)

    assert Counter(zipf.draw(random) for _ in range(10_000))["a"] == pytest.approx(5_000, rel=0.05)


@pytest.mark.parametrize(("choices", "exponent"), [([], 1.0), ([1], -1.0)])
def test_zipf_refuses(choices: list[int], exponent: float) -> None:
    with pytest.raises(ValueError, match="wanted some and 0 or more"):
        Zipf(choices, exponent, seed=0)


def test_deck_deals_distinct_items_evenly() -> None:
    deck, random = Deck(range(50), seed=1), Random(0)

    hands = [deck.deal(20, random) for _ in range(5_000)]

    assert all(len(set(hand)) == 20 for hand in hands)
    dealt = Counter(item for hand in hands for item in hand)
    assert len(dealt) == 50
    assert all(count == pytest.approx(2_000, rel=0.1) for count in dealt.values())


def test_deck_deals_all_it_has() -> None:
    assert sorted(Deck([1, 2, 3], seed=0).deal(9, Random(0))) == [1, 2, 3]
    with pytest.raises(ValueError, match="found no items"):
        Deck([], seed=0)
