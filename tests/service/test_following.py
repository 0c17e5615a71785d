"""Following what is published: a new generation, another model, and publications that cannot be served."""

import gc
import os
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import torch

from model.bundle import Bundle, BundleError, load_bundle, write_bundle
from model.cache_format import Manifest, active_key, leases_key, manifest_key
from service.errors import PublicationError, StartupError
from service.publication.warm_up import make_ready, score_nobody
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, tiny_bundle, tiny_data, user_id

USER = user_id("int", 1)
CANDIDATES = [item_id("int", number) for number in range(5)]
HISTORY = [item_id("int", number) for number in range(30)]


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


def test_what_cannot_be_served_is_refused_and_the_old_stays(
    caches: tuple[Cache, Cache], serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = caches
    caplog.set_level("INFO")
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)

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
        wait_for(partial(lambda wanted: refusals(client) == wanted, count))
        assert served(client) == (one.bundle.model_id, "good", "cached")
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["degraded"]) == (200, ["publication_refused"])
    assert "what is published is served again" not in caplog.text
    one.point_at(one.bundle.model_id, "good")
    wait_for(lambda: client.get("/readyz").json()["degraded"] == [])
    mended = f"what is published is served again: model {one.bundle.model_id}, generation good"
    assert [record.levelname for record in caplog.records if record.message == mended] == ["INFO"]


def test_what_is_missing_is_said_by_model_generation_and_key(
    cache: Cache, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.publication.follow.RETRY_S", 0.1)
    cache.publish({USER: HISTORY}, "good")
    client = serve(cache, poll_seconds=0.02)
    cache.point_at("0" * 12, "gone")
    wait_for(lambda: refusals(client) == 1)
    what = f"generation gone of model {'0' * 12}"
    key = manifest_key(cache.prefix, "0" * 12, "gone")
    assert f"{what} has no manifest at {key}: build the cache again" in caplog.records[-1].message
    cache.redis.set(key, b"{}")
    wait_for(lambda: f"{what} has a bad manifest at {key}: manifest." in caplog.text)


def test_garbage_for_a_pointer_is_said_in_one_line_and_what_is_served_is_leased_on(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    cache.publish({USER: HISTORY}, "good")
    client = serve(cache, poll_seconds=0.02)
    cache.redis.set(active_key(cache.prefix), b"garbage")
    wait_for(lambda: refusals(client) == 1)
    assert f"{active_key(cache.prefix)}: active pointer is not JSON" in caplog.records[-1].message
    assert caplog.records[-1].exc_info is None
    before = leases(cache)["good"]
    wait_for(lambda: leases(cache)["good"] > before)


def test_a_broken_bundle_is_not_loaded_at_every_poll_while_no_lease_is_taken(
    caches: tuple[Cache, Cache], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers reads, and its writes wait."""
    one, other = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02, store_timeout_ms=100)
    loads: list[Path] = []
    paused = Event()

    def fail(folder: Path, *_: object) -> Bundle:
        loads.append(folder)
        assert paused.wait(20)
        raise BundleError("broken")

    monkeypatch.setattr("service.active.load_bundle", fail)
    other.publish({USER: HISTORY}, "second")
    wait_for(lambda: bool(loads))
    one.redis.execute_command("CLIENT PAUSE", 60_000, "WRITE")
    try:
        paused.set()
        wait_for(lambda: refusals(client) == 1)
        time.sleep(1)  # some eight polls
    finally:
        one.redis.execute_command("CLIENT UNPAUSE")
    assert len(loads) == 1


def break_weights_by_a_bit(folder: Path) -> None:
    """In the last tensor's last number, where the file stays well-formed and the value finite."""
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1
    weights.write_bytes(data)


def swap_for_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda folder: os.truncate(folder / "weights.safetensors", 1000), "missing or cut short"),
    "one bit": (break_weights_by_a_bit, "its tensors are"),
    "no vocabulary": (lambda folder: (folder / "vocab.safetensors").unlink(), "vocab.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a folder for a file": (lambda folder: swap_for_a_folder(folder / "weights.safetensors"), "weights.safetensors"),
    "config of no model": (lambda folder: (folder / "config.json").write_text("{}"), "not a bundle's config"),
}


def test_a_broken_bundle_is_refused(
    caches: tuple[Cache, Cache], serve: Serve, other_bundles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    whole, folder = other_bundles / other.bundle.model_id, other.bundles_dir / other.bundle.model_id

    def put_back() -> None:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)

    foreign = one.bundles_dir / one.bundle.model_id / "config.json"
    cases = BREAKS | {
        "another's config": (lambda folder: shutil.copy(foreign, folder), "its tensors are"),
        "another's bundle": (lambda folder: shutil.copytree(foreign.parent, folder, dirs_exist_ok=True), "is model "),
    }
    for count, (name, (break_it, said)) in enumerate(cases.items(), start=1):
        put_back()
        break_it(folder)
        other.publish({USER: HISTORY}, f"broken-{count}")
        wait_for(partial(lambda wanted: refusals(client) == wanted, count))
        assert said in caplog.records[-1].message, name
        assert served(client) == (one.bundle.model_id, "good", "cached")
        assert client.get("/readyz").json() == {"status": "ready", "degraded": ["publication_refused"]}
    put_back()
    other.publish({USER: HISTORY}, "whole")
    wait_for(lambda: served(client) == (other.bundle.model_id, "whole", "cached"))
    assert client.get("/readyz").json()["degraded"] == []


def test_weights_that_are_not_numbers_are_refused_though_their_hash_is_right(
    caches: tuple[Cache, Cache], serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = caches
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    bundle = load_bundle(one.bundles_dir / one.bundle.model_id)
    bundle.ranker.item_embedding.weight[-1] = torch.nan
    parts = (bundle.ranker, bundle.catalogue, bundle.user_features, bundle.context_features, bundle.metadata)
    folder = write_bundle(one.bundles_dir, *parts)
    broken = Cache(one.url, one.prefix, one.bundles_dir, replace(bundle, model_id=folder.name))
    broken.redis = one.redis
    broken.publish(generation="broken")
    wait_for(lambda: refusals(client) == 1)
    assert "item_embedding.weight is torch.float32 or holds values that are not finite" in caplog.records[-1].message
    assert served(client) == (one.bundle.model_id, "good", "cached")


def refusals(client: httpx.Client) -> float:
    [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith("lrea_refused_pub")][:1]
    return float(line.split()[1])


CROWD = [user_id("int", number) for number in range(2, 22)]


def serve_crowd(cache: Cache, serve: Serve) -> httpx.Client:
    """A service in which a crowd is resident, following every 20 ms."""
    cache.publish(dict.fromkeys(CROWD, HISTORY), "good")
    client = serve(cache, poll_seconds=0.02)
    for user in CROWD:
        answer = client.post("/v1/score", json={"user_id": user, "candidates": CANDIDATES}).json()
        assert answer["user_state"] == "cached"
    return client


def claim(cache: Cache, generation: str, /, *, like: str, **changes: Any) -> None:
    """Publish a manifest like another generation's, but for the changes, whatever is there."""
    prefix, model_id = cache.prefix, cache.bundle.model_id
    other = Manifest.from_json(cache.redis.get(manifest_key(prefix, model_id, like)))
    manifest = replace(other, **{"generation": generation} | changes)
    cache.redis.set(manifest_key(prefix, model_id, generation), manifest.to_json())
    cache.point_at(model_id, generation)


def generation(client: httpx.Client) -> str:
    return str(client.get("/v1/model").json()["generation"])


def test_a_generation_without_its_records_is_refused(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve_crowd(cache, serve)
    claim(cache, "emptied", like="good", users=20)
    wait_for(lambda: refusals(client) == 1)
    assert "has no record of any of 20 users who have one now, and its manifest counts 20" in caplog.records[-1].message
    assert generation(client) == "good"
    cache.publish({CROWD[0]: HISTORY}, "of-one")
    wait_for(lambda: generation(client) == "of-one")
    cache.publish({}, "of-nobody")
    wait_for(lambda: generation(client) == "of-nobody")


def test_a_generation_of_bad_records_only_is_refused(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve_crowd(cache, serve)
    foreign = cache.redis.get(cache.key(CROWD[0], "good"))
    for user in CROWD[:3]:
        cache.redis.set(cache.key(user, "bad"), foreign)
    claim(cache, "bad", like="good", users=20)
    wait_for(lambda: refusals(client) == 1)
    assert "has no good record among 3 (foreign_generation): build the cache again" in caplog.records[-1].message
    assert generation(client) == "good"
    cache.redis.set(cache.key(CROWD[0], "so-so"), foreign)
    cache.publish(dict.fromkeys(CROWD[1:3], HISTORY), "so-so")
    wait_for(lambda: generation(client) == "so-so")


@pytest.mark.parametrize("instead", ["good", "newer"])
def test_what_is_overtaken_while_it_is_loaded_is_never_served(
    caches: tuple[Cache, Cache],
    serve: Serve,
    instead: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A, B, A and A, B, C."""
    one, other = caches
    caplog.set_level("INFO")
    one.publish({USER: HISTORY}, "good")
    client = serve(one, poll_seconds=0.02)
    loading, go_on = Event(), Event()

    def slowly(*arguments: Any) -> Bundle:
        loading.set()
        assert go_on.wait(20)
        return load_bundle(*arguments)

    monkeypatch.setattr("service.active.load_bundle", slowly)
    other.publish({USER: HISTORY}, "overtaken")
    assert loading.wait(20)
    assert served(client) == (one.bundle.model_id, "good", "cached"), "the old one serves while another is loaded"
    one.publish({USER: HISTORY}, instead)
    go_on.set()
    wait_for(lambda: served(client) == (one.bundle.model_id, instead, "cached"))
    one.publish({USER: HISTORY}, "last")
    wait_for(lambda: served(client) == (one.bundle.model_id, "last", "cached"))
    assert f"serving model {one.bundle.model_id}, generation last" in caplog.text
    assert f"serving model {other.bundle.model_id}" not in caplog.text
    assert refusals(client) == 0


def test_a_model_is_gone_when_its_last_request_is_done(
    caches: tuple[Cache, Cache], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, which looks at nothing that was there when the service began."""
    one, other = caches
    loaded: list[weakref.ref[Bundle]] = []

    def watched(*arguments: Any) -> Bundle:
        bundle = load_bundle(*arguments)
        loaded.append(weakref.ref(bundle))
        return bundle

    monkeypatch.setattr("service.active.load_bundle", watched)
    one.publish({USER: HISTORY}, "first")
    client = serve(one, poll_seconds=0.02)
    assert served(client) == (one.bundle.model_id, "first", "cached")
    gc.disable()
    try:
        for cache in (other, one, other):
            cache.publish({USER: HISTORY}, "second")
            wait_for(partial(lambda wanted: served(client) == wanted, (cache.bundle.model_id, "second", "cached")))
            wait_for(lambda: [ref() is None for ref in loaded] == [True] * (len(loaded) - 1) + [False])
    finally:
        gc.enable()
    assert len(loaded) == 4


@pytest.mark.parametrize(
    "broken",
    [
        "service.active.load_bundle",
        "service.publication.warm_up._nobody",
        "service.publication.follow.activate",
    ],
)
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
    monkeypatch.setattr("service.publication.follow.RETRY_S", 0.1)
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
    monkeypatch.setattr("service.publication.follow.RETRY_S", 0.1)
    wait_for(lambda: served(client) == (other.bundle.model_id, "second", "cached"))
    assert client.get("/readyz").json()["degraded"] == []


def test_what_grows_with_the_catalogue_is_made_before_the_scoring_thread_is_asked(int_bundles: Path) -> None:
    [folder] = int_bundles.iterdir()
    bundle = load_bundle(folder)
    make_ready(bundle)
    catalogue = bundle.catalogue
    made = vars(catalogue).keys() | vars(catalogue.items).keys()
    score_nobody(bundle, users=2, candidates=3)
    assert vars(catalogue).keys() | vars(catalogue.items).keys() == made


@pytest.mark.parametrize("place", ["mlp", "item_embedding"])
def test_a_bundle_whose_scores_are_not_numbers_is_refused(int_bundles: Path, place: str) -> None:
    [folder] = int_bundles.iterdir()
    good, bundle = load_bundle(folder), load_bundle(folder)
    make_ready(good)
    score_nobody(good, users=2, candidates=3)
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
        serve(one.in_folder(tmp_path / "nowhere"), key_prefix=f"{one.prefix}-other")
    one.point_at(other.bundle.model_id, "no-manifest")
    with pytest.raises(StartupError, match="no manifest"):
        serve(one)


BAD = r"generation wrong of model \w+ has a bad manifest at .*:wrong:manifest: "


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"format_version": 99}, f"{BAD}manifest has format version 99, this program reads 1: build the cache with"),
        (
            {"user_kind": "string", "shape": "longer"},
            r"generation wrong of model \w+ was built for user_kind string \(the bundle's: int\), "
            r"long_length 25 \(the bundle's: 24\): build the cache with this bundle",
        ),
        (
            {"generation": "another"},
            r"generation wrong of model \w+ has the manifest of generation another of model \w+ at .*: build the cache",
        ),
        ({"users": -1}, f"{BAD}manifest.users is -1, wanted an integer, 0 or more"),
    ],
)
def test_a_start_with_a_manifest_that_does_not_fit_says_what_to_build(
    cache: Cache, serve: Serve, manifest: dict[str, Any], said: str
) -> None:
    shape = cache.bundle.record_shape
    longer = {"shape": replace(shape, long_length=shape.long_length + 1)} if "shape" in manifest else {}
    cache.publish({}, "right")
    claim(cache, "wrong", like="right", **manifest | longer)
    with pytest.raises(StartupError, match=f"^what the store says is active cannot be served: {said}"):
        serve(cache)


def test_a_start_warns_of_a_choice_without_effect_and_of_a_store_that_says_nothing(
    caches: tuple[Cache, Cache], serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = caches
    serve(one, model_id=other.bundle.model_id)
    assert "nothing is published in the store, every user is a miss until it is: see LREA_KEY_PREFIX" in caplog.text
    one.publish({})
    served_now = serve(one, model_id=other.bundle.model_id).get("/v1/model").json()
    assert served_now["model_id"] == one.bundle.model_id
    serve(one, store_url=f"redis://127.0.0.1:{free_port()}/0", model_id=other.bundle.model_id)
    assert "starting without the store, every user is a miss until it answers: " in caplog.text
    assert f"LREA_MODEL_ID is {other.bundle.model_id} and has no effect: the store says that" in caplog.text


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
