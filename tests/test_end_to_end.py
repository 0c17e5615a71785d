"""The whole path, every part real: data, training, build into a store, the service, and the comparisons over HTTP."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
import typer
from redis import Redis
from typer.testing import CliRunner

from cache_builder.options import BuildOptions, Summary
from cache_builder.store import Store
from loadtest import fidelity
from loadtest.client import ScoringClient, logits_of
from loadtest.replay import main as main_of_replay
from loadtest.replay import replay
from model.bundle import Bundle
from model.cache_format import Precision, decode, generation_prefix, record_key
from model.evaluation.evaluate import EvaluationConfig, evaluate
from model.identifiers import Id, IdKind
from model.log.behaviours import InteractionLog, read_log
from model.progress import LineReporter
from model.ranker import ScoringInput
from tests.building import build_here
from tests.service.serving import running_service
from tests.tiny import AS_OF, ITEMS, USERS, item_id, tiny_bundle, tiny_data, user_id

LATE = 3  # this user's first behaviour comes after T: in users.parquet, but not in the cache
UNQUANTISED: dict[Precision, float] = {"float16": 3e-3, "float32": 1e-4, "int8": 7e-2}
DEVICES = ("phone", "tablet", None, "never seen")


@dataclass(frozen=True)
class World:
    """A data folder, a model trained on it, and its requests after T with their offline logits."""

    kind: IdKind
    data: Path
    log: InteractionLog
    bundles: Path
    bundle: Bundle
    samples: Path
    auc: float

    @property
    def bundle_folder(self) -> Path:
        return self.bundles / self.bundle.model_id

    @property
    def late(self) -> Id:
        return user_id(self.kind, LATE)


@dataclass(frozen=True)
class Cache:
    """Where this test builds: one prefix of the session's store."""

    world: World
    url: str
    prefix: str

    def build(self, as_of: int | None = AS_OF, precision: Precision = "float16", **other: Bundle) -> Summary:
        bundle = other.get("bundle", self.world.bundle)
        with Store(self.url) as store, open("/dev/null", "w") as nowhere:
            options = BuildOptions(self.prefix, as_of, precision, batch_users=7)
            return build_here(bundle, self.world.data, store, options, LineReporter(nowhere))

    def settings(self) -> dict[str, Any]:
        places = {"store_url": self.url, "key_prefix": self.prefix, "bundles_dir": self.world.bundles}
        return {**places, "poll_seconds": 0.05}

    def fidelity(self, url: str, as_of: int | None = AS_OF) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON of `python -m loadtest.fidelity`, over all users and items."""
        app = typer.Typer()
        app.command()(fidelity.main)
        arguments: list[object] = ["--url", url, "--store", self.url, "--key-prefix", self.prefix]
        arguments += ["--bundle", self.world.bundle_folder, "--data", self.world.data, "--candidates", ITEMS]
        arguments += [] if as_of is None else ["--as-of", as_of]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, orjson.loads(result.stdout.splitlines()[-1])

    def logits(self, generation: str, user: Id, asked: list[Id]) -> np.ndarray[Any, Any]:
        """The model in process over the record of one generation."""
        bundle = self.world.bundle
        with Redis.from_url(self.url) as client:
            data = client.get(record_key(self.prefix, bundle.model_id, generation, user))
        assert isinstance(data, bytes)
        names = {"model_id": bundle.model_id, "generation": generation}
        record = decode(data, user_id=user, shape=bundle.record_shape, **names)
        request = ScoringInput(
            bundle.state_from_record(record),
            bundle.short_window(record.tail_ids),
            torch.from_numpy(record.user_codes.astype(np.int64)),
            bundle.context_features.encode({}),
            bundle.catalogue.encode(asked),
        )
        return np.asarray(bundle.ranker.score(request).numpy())


@pytest.fixture(scope="module", params=["int", "string"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Integer ids and sampled negatives; string ids and labels. Both with item, user and context columns."""
    kind: IdKind = request.param
    folder = tmp_path_factory.mktemp(f"end-to-end-{kind}")
    data = tiny_data(folder / "data", item_kind=kind, user_kind=kind, labels=kind == "string")
    table = pq.read_table(data / "interactions.parquet")
    early = table["timestamp"].to_numpy() < AS_OF
    his = np.array([user == user_id(kind, LATE) for user in table["user_id"].to_pylist()])
    pq.write_table(table.filter(~(early & his)), data / "interactions.parquet")
    log, bundle = read_log(data), tiny_bundle(folder / "bundles", data)
    judgement = evaluate(bundle, log, "as-of", EvaluationConfig(AS_OF))
    judgement.write(folder / "samples.parquet", log, bundle)
    auc = judgement.metrics()["auc"]
    return World(kind, data, log, folder / "bundles", bundle, folder / "samples.parquet", auc)


@pytest.fixture
def cache(world: World, store_url: str, key_prefix: str) -> Cache:
    return Cache(world, store_url, key_prefix)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 15
    while not condition():
        assert monotonic() < deadline, "it did not happen within 15 s"


def url_of(client: httpx.Client) -> str:
    return str(client.base_url)


def items(world: World) -> list[Id]:
    """Every item of the catalogue, and two that nobody knows."""
    return [item_id(world.kind, number) for number in range(ITEMS + 2)]


@pytest.mark.parametrize("precision", list(UNQUANTISED))
def test_scores_over_http_are_the_models(world: World, cache: Cache, precision: Precision) -> None:
    summary = cache.build(precision=precision)
    with running_service(**cache.settings()) as client:
        replayed = replay(world.samples, url_of(client))
        exit_code, compared = cache.fidelity(url_of(client))

    rows = pq.read_table(world.samples).to_pylist()
    assert world.auc > 0.6, "a model that knows nothing would prove nothing"
    assert replayed["requests"] == len(rows) > 50
    assert replayed["auc_offline"] == world.auc
    # int8 moves a logit by up to 7e-2, and there are only 1,400 candidates to rank.
    assert abs(replayed["auc"] - world.auc) <= (1e-3 if precision == "int8" else 1e-4)
    assert replayed["max_abs_diff_offline"] <= UNQUANTISED[precision]
    late = sum(row["user_id"] == world.late for row in rows)
    assert late > 0
    assert replayed["user_states"] == {"cached": len(rows) - late, "empty": late}
    assert {"total", "fetch", "compute"} <= replayed["latency_ms"].keys()

    assert exit_code == 0
    assert (compared["users"], compared["candidates"]) == (summary.users, ITEMS)
    assert summary.users == USERS - 1
    assert compared["max_abs_diff"] <= 1e-4
    assert compared["max_abs_diff_unquantised"] <= UNQUANTISED[precision]
    if precision != "float32":
        assert compared["max_abs_diff_unquantised"] > compared["max_abs_diff"], "nothing was quantised"


def test_every_user_is_in_the_state_that_t_says(world: World, cache: Cache) -> None:
    cache.build()
    asked, states = items(world), {}
    with running_service(**cache.settings()) as client, ScoringClient(url_of(client)) as scoring:
        for number in range(USERS + 1):
            answer = scoring.score(user_id(world.kind, number), asked, {"device": DEVICES[number % len(DEVICES)]})
            assert answer["degraded"] == []
            assert answer["unknown_candidates"] == 2
            states[number] = answer["user_state"]
    assert states == {number: "empty" if number in (LATE, USERS) else "cached" for number in range(USERS + 1)}


def test_context_changes_the_scores(world: World, cache: Cache) -> None:
    """Or the replay of context columns above would prove nothing."""
    cache.build()
    with running_service(**cache.settings()) as client, ScoringClient(url_of(client)) as scoring:
        known = [scoring.score(user_id(world.kind, 0), items(world), {"device": device}) for device in DEVICES]
    scores = [tuple(answer["scores"]) for answer in known]
    assert len(set(scores[:3])) == 3
    assert scores[3] == scores[2], "a value that nobody has seen says no more than a missing one"


def replay_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(main_of_replay)
    return app


def test_a_second_build_is_picked_up_while_serving(world: World, cache: Cache) -> None:
    """No restart, no wrong answer on the way, and afterwards nothing of the old generation."""
    first = cache.build()
    user, asked = user_id(world.kind, 0), items(world)
    answers: dict[str, set[tuple[float, ...]]] = {}

    with running_service(**cache.settings()) as client, ScoringClient(url_of(client)) as scoring:

        def ask() -> str:
            answer = scoring.score(user, asked)
            assert (answer["user_state"], answer["degraded"]) == ("cached", [])
            answers.setdefault(answer["generation"], set()).add(tuple(answer["scores"]))
            return str(answer["generation"])

        assert ask() == first.generation
        second = cache.build(as_of=None)
        wait_for(lambda: ask() == second.generation)
        with Redis.from_url(cache.url) as store:
            old = generation_prefix(cache.prefix, world.bundle.model_id, first.generation)
            old_logits = cache.logits(first.generation, user, asked)
            store.delete(*store.scan_iter(match=f"{old}u:*", count=1000))
        assert ask() == second.generation
        late = scoring.score(world.late, asked)
        exit_code, compared = cache.fidelity(url_of(client), as_of=None)
        with_old_cache = CliRunner().invoke(replay_app(), ["--samples", str(world.samples), "--url", url_of(client)])

    assert answers.keys() == {first.generation, second.generation}
    logits = {generation: [logits_of(scores) for scores in found] for generation, found in answers.items()}
    for generation, wanted in (
        (first.generation, old_logits),
        (second.generation, cache.logits(second.generation, user, asked)),
    ):
        for found in logits[generation]:
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    assert np.abs(logits[first.generation][0] - logits[second.generation][0]).max() > 1e-2
    assert late["user_state"] == "cached"
    assert (exit_code, compared["users"]) == (0, USERS)
    assert compared["max_abs_diff"] <= 1e-4
    assert compared["max_abs_diff_unquantised"] <= 3e-3
    # The samples were judged as of T: a cache of a later T knows more, and its figures must not pass for theirs.
    assert with_old_cache.exit_code == 1
    assert "is the cache built from the same data and as of the T of the samples?" in with_old_cache.stderr


def test_a_model_that_the_service_does_not_have_leaves_the_old_one(world: World, cache: Cache, tmp_path: Path) -> None:
    first = cache.build()
    stranger = tiny_bundle(tmp_path, world.data, rank=2)
    with running_service(**cache.settings()) as client:
        before = replay(world.samples, url_of(client))
        published = cache.build(bundle=stranger)
        assert published.model_id == stranger.model_id != world.bundle.model_id
        wait_for(lambda: client.get("/readyz").json()["degraded"] == ["publication_refused"])
        assert client.get("/readyz").status_code == 200
        served = client.get("/v1/model").json()
        after = replay(world.samples, url_of(client))
        exit_code, compared = cache.fidelity(url_of(client))
        # Once its bundle is there, a service that starts serves it.
        shutil.copytree(tmp_path / stranger.model_id, tmp_path / "both" / stranger.model_id)
        shutil.copytree(world.bundle_folder, tmp_path / "both" / world.bundle.model_id)
        with running_service(**cache.settings() | {"bundles_dir": tmp_path / "both"}) as other:
            assert other.get("/v1/model").json()["model_id"] == stranger.model_id

    assert (served["model_id"], served["generation"]) == (world.bundle.model_id, first.generation)
    assert Counter(after["user_states"]) == Counter(before["user_states"])
    assert (after["auc"], after["max_abs_diff_offline"]) == (before["auc"], before["max_abs_diff_offline"])
    assert exit_code == 0
    assert compared["users"] == first.users
