"""Following what is published: a new generation, another model, and publications that cannot be served."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from model.bundle import load_bundle
from model.cache_format import leases_key
from service.errors import PublicationError, StartupError
from service.warm_up import make_ready, score_nobody
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, tiny_bundle, tiny_data, user_id

USER = user_id("int", 1)
CANDIDATES = [item_id("int", number) for number in range(5)]
HISTORY = [item_id("int", number) for number in range(30)]


@pytest.fixture(scope="session")
def other_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another shape."""
    folder = tmp_path_factory.mktemp("other")
    tiny_bundle(folder / "bundles", tiny_data(folder / "data"), rank=2)
    return folder / "bundles"


@pytest.fixture
def caches(
    store_url: str, key_prefix: str, int_bundles: Path, other_bundles: Path, tmp_path: Path
) -> Iterator[tuple[Cache, Cache]]:
    """Two models' caches under one prefix, their bundles in one folder."""
    with (
        Cache.of_bundles(store_url, key_prefix, int_bundles) as one,
        Cache.of_bundles(store_url, key_prefix, other_bundles) as other,
    ):
        for cache in (one, other):
            shutil.copytree(cache.bundles_dir / cache.bundle.model_id, tmp_path / cache.bundle.model_id)
        yield replace_folder(one, tmp_path), replace_folder(other, tmp_path)


def replace_folder(cache: Cache, folder: Path) -> Cache:
    moved = Cache(cache.url, cache.prefix, folder, cache.bundle)
    moved.redis = cache.redis
    return moved


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.02)


def served(client: httpx.Client) -> tuple[str, str | None, str]:
    body = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES}).json()
    return body["model_id"], body["generation"], body["user_state"]


def test_a_new_generation_is_adopted(cache: Cache, serve: Serve) -> None:
    cache.publish({}, "first")
    client = serve(cache, poll_seconds=0.05)
    assert served(client) == (cache.bundle.model_id, "first", "empty")
    cache.publish({USER: HISTORY}, "second")
    wait_for(lambda: served(client) == (cache.bundle.model_id, "second", "cached"))
    labels = f'device="cpu",generation="second",model_id="{cache.bundle.model_id}"'
    info = [line for line in client.get("/metrics").text.splitlines() if line.startswith("lrea_model_info{")]
    assert info == [f"lrea_model_info{{{labels}}} 1.0"]


def test_another_model_is_loaded_and_swapped_in_and_back(caches: tuple[Cache, Cache], serve: Serve) -> None:
    one, other = caches
    one.publish({USER: HISTORY}, "first")
    client = serve(one, poll_seconds=0.05)
    other.publish({USER: HISTORY}, "second")
    wait_for(lambda: served(client) == (other.bundle.model_id, "second", "cached"))
    assert client.get("/v1/model").json()["rank"] == 2
    one.point_at(one.bundle.model_id, "first")
    wait_for(lambda: served(client) == (one.bundle.model_id, "first", "cached"))


def test_what_cannot_be_served_is_refused_and_the_old_stays(caches: tuple[Cache, Cache], serve: Serve) -> None:
    one, other = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)

    def refused() -> float:
        [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith("lrea_refused_pub")][:1]
        return float(line.split()[1])

    shutil.rmtree(other.bundles_dir / other.bundle.model_id)
    publications: list[Callable[[], None]] = [
        lambda: one.point_at("0" * 12, "no-manifest"),
        lambda: one.publish(generation="other-users", user_kind="string"),
        lambda: one.publish(generation="other-shape", shape=replace(one.bundle.record_shape, long_length=9)),
        lambda: one.redis.set(f"{one.prefix}:active", b"garbage"),
        lambda: other.publish(generation="no-bundle"),
    ]
    for count, publish in enumerate(publications, start=1):
        publish()
        wait_for(partial(lambda wanted: refused() == wanted, count))
        assert served(client) == (one.bundle.model_id, "good", "cached")
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["degraded"]) == (200, ["publication_refused"])
    one.point_at(one.bundle.model_id, "good")
    wait_for(lambda: client.get("/readyz").json()["degraded"] == [])


def test_a_broken_bundle_is_refused(caches: tuple[Cache, Cache], serve: Serve) -> None:
    one, other = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    weights = other.bundles_dir / other.bundle.model_id / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    other.publish({USER: HISTORY}, "second")
    wait_for(lambda: client.get("/readyz").json()["degraded"] == ["publication_refused"])
    assert served(client) == (one.bundle.model_id, "good", "cached")


@pytest.mark.parametrize("broken", ["service.active.load_bundle", "service.warm_up._nobody", "service.follow.activate"])
def test_a_bundle_that_fails_unexpectedly_is_refused_once_and_tried_again(
    caches: tuple[Cache, Cache],
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    one, other = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    monkeypatch.setattr("service.follow.RETRY_S", 0.1)
    tries: list[str] = []

    def fail(*_: object) -> None:
        tries.append(broken)
        raise MemoryError("not enough of it")

    monkeypatch.setattr(broken, fail)
    other.publish({USER: HISTORY}, "second")
    wait_for(lambda: len(tries) >= 3)
    assert "MemoryError: not enough of it" in caplog.text
    assert caplog.text.count("what is published cannot be served") == 1
    assert "lrea_refused_publications_total 1.0" in client.get("/metrics").text
    assert served(client) == (one.bundle.model_id, "good", "cached")
    monkeypatch.undo()
    monkeypatch.setattr("service.follow.RETRY_S", 0.1)
    wait_for(lambda: served(client) == (other.bundle.model_id, "second", "cached"))
    assert client.get("/readyz").json()["degraded"] == []


@pytest.mark.parametrize("place", ["mlp", "item_embedding"])
def test_a_bundle_whose_scores_are_not_numbers_is_refused(int_bundles: Path, place: str) -> None:
    [folder] = int_bundles.iterdir()
    bundle = load_bundle(folder)
    make_ready(bundle)
    score_nobody(bundle, users=2, candidates=3)
    weights = [tensor for name, tensor in bundle.ranker.named_parameters() if name.startswith(place)][-1]
    weights[-1] = torch.nan  # of the embeddings: an item's that the warm-up does not score
    with pytest.raises(PublicationError, match="not finite"):
        make_ready(bundle)
    if place == "mlp":
        with pytest.raises(PublicationError, match="not finite"):
            score_nobody(bundle, users=2, candidates=3)


def test_a_model_that_reads_the_whole_history_is_refused(
    caches: tuple[Cache, Cache], serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, _ = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    data = tiny_data(tmp_path_factory.mktemp("data"))
    uncacheable = Cache(one.url, one.prefix, one.bundles_dir, tiny_bundle(one.bundles_dir, data, long_attention="sdim"))
    uncacheable.redis = one.redis
    uncacheable.publish(generation="second")
    wait_for(lambda: client.get("/readyz").json()["degraded"] == ["publication_refused"])
    assert served(client) == (one.bundle.model_id, "good", "cached")
    with pytest.raises(StartupError, match=f"model {uncacheable.bundle.model_id} cannot be served: .* sdim reads"):
        serve(one)


def test_a_start_with_nothing_to_serve_says_what_to_do(
    caches: tuple[Cache, Cache], serve: Serve, tmp_path: Path
) -> None:
    one, other = caches
    with pytest.raises(StartupError, match=r"has 2 bundles .* LREA_MODEL_ID"):
        serve(one)
    assert served(serve(one, model_id=other.bundle.model_id))[:2] == (other.bundle.model_id, None)
    one.publish({})
    shutil.rmtree(one.bundles_dir / one.bundle.model_id)
    with pytest.raises(StartupError, match=f"no bundle at .*{one.bundle.model_id}"):
        serve(one)
    with pytest.raises(StartupError, match="no bundle in"):
        serve(replace_folder(one, tmp_path / "nowhere"), key_prefix=f"{one.prefix}-other")
    one.point_at(other.bundle.model_id, "no-manifest")
    with pytest.raises(StartupError, match="no manifest"):
        serve(one)


def leases(cache: Cache) -> dict[str, float]:
    """What the builder sees: when each generation's lease ends, in ms."""
    found = cache.redis.zrange(leases_key(cache.prefix), 0, -1, withscores=True)
    return {name.decode().split(":")[1]: end for name, end in found}


def test_a_lease_says_what_is_served_and_that_of_the_one_before_ends(cache: Cache, serve: Serve) -> None:
    cache.publish({}, "first")
    serve(cache, poll_seconds=0.05)
    wait_for(lambda: "first" in leases(cache))
    seconds, _ = cache.redis.time()
    assert 50_000 < leases(cache)["first"] - seconds * 1000 < 62_000
    before = leases(cache)["first"]
    wait_for(lambda: leases(cache)["first"] > before)  # it is renewed
    cache.publish({}, "second")
    wait_for(lambda: "second" in leases(cache))
    ended = leases(cache)["first"]
    wait_for(lambda: leases(cache)["second"] > ended)
    assert leases(cache)["first"] == ended
    [member] = [name for name in cache.redis.zrange(leases_key(cache.prefix), 0, -1) if b":first:" in name]
    cache.redis.zadd(leases_key(cache.prefix), {member: seconds * 1000 - 1})
    wait_for(lambda: "first" not in leases(cache))


def test_a_store_that_may_only_be_read_is_served_all_the_same(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    cache.publish({USER: HISTORY}, "first")
    cache.redis.acl_setuser(
        cache.prefix, enabled=True, passwords=["+p"], keys=["*"], commands=["+get", "+mget", "+ping"], reset=True
    )
    limited = replace_url(cache, cache.url.replace("redis://", f"redis://{cache.prefix}:p@"))
    try:
        client = serve(limited, poll_seconds=0.05)
        wait_for(lambda: "the store takes no lease, " in caplog.text)
        time.sleep(0.2)  # some polls more
        assert served(client) == (cache.bundle.model_id, "first", "cached")
        assert client.get("/readyz").json() == {"status": "ready", "degraded": []}
        assert caplog.text.count("the store takes no lease") == 1
    finally:
        cache.redis.acl_deluser(cache.prefix)


def replace_url(cache: Cache, url: str) -> Cache:
    moved = Cache(url, cache.prefix, cache.bundles_dir, cache.bundle)
    moved.redis = cache.redis
    return moved
