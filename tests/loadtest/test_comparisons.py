"""Replay and fidelity against a real service that is not as it should be: one message, and an exit code of 1."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from redis import Redis
from typer.testing import CliRunner, Result

from cache_builder.options import BuildOptions
from cache_builder.store import Store
from loadtest import fidelity, replay
from model.bundle import Bundle
from model.cache_format import active_key, decode, encode, record_key
from model.evaluation.evaluate import EvaluationConfig, evaluate
from model.identifiers import Id
from model.log.behaviours import read_log
from model.progress import LineReporter
from tests.building import build_here
from tests.service.serving import running_service
from tests.tiny import AS_OF, ITEMS, USERS, tiny_bundle, tiny_data, user_id

USER = user_id("int", 5)


@dataclass(frozen=True)
class Served:
    """A service over a published cache, and what the comparisons are given."""

    url: str
    store: str
    prefix: str
    generation: str
    bundle: Bundle
    folder: Path  # data, bundles, others (bundles of another model), samples.parquet, others.parquet

    def key(self, user: Id = USER) -> str:
        return record_key(self.prefix, self.bundle.model_id, self.generation, user)

    def replay(self, samples: Path | str = "samples.parquet", **changes: str) -> Result:
        return run(replay.main, "--samples", self.folder / samples, "--url", changes.get("url", self.url))

    def fidelity(self, **changes: object) -> Result:
        bundle = self.folder / "bundles" / self.bundle.model_id
        options = {"url": self.url, "store": self.store, "key-prefix": self.prefix, "bundle": bundle}
        options |= {"data": self.folder / "data", "as-of": AS_OF, "candidates": ITEMS}
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        return run(fidelity.main, *(word for name, value in options.items() for word in (f"--{name}", value)))


def run(main: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, message: str) -> None:
    """Exit code 1, nothing on stdout, and one message after whatever was said of the progress."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert all(line.startswith("replaying: ") for line in progress)
    assert last.startswith("error: ")
    assert message in last


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, store_url: str) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("comparisons")
    log = read_log(tiny_data(folder / "data"))
    bundle = tiny_bundle(folder / "bundles", folder / "data")
    other = tiny_bundle(folder / "others", folder / "data", rank=2)
    for judged, name in ((bundle, "samples.parquet"), (other, "others.parquet")):
        evaluate(judged, log, "as-of", EvaluationConfig(AS_OF)).write(folder / name, log, judged)
    prefix = f"comparisons-{folder.name}"
    with Store(store_url) as store, (folder / "log").open("w") as progress:
        summary = build_here(bundle, folder / "data", store, BuildOptions(prefix, AS_OF), LineReporter(progress))
    # Without resident users, so that what a test does to a record is seen at once.
    settings: dict[str, Any] = {"key_prefix": prefix, "bundles_dir": folder / "bundles", "user_cache_mb": 0}
    with running_service(store_url=store_url, **settings) as client:
        yield Served(str(client.base_url), store_url, prefix, summary.generation, bundle, folder)


@pytest.fixture
def records(served: Served) -> Iterator[Any]:
    """A client of the store; what a test does to the cache's records is undone."""
    with Redis.from_url(served.store) as client:
        before = {key: client.get(key) for key in client.scan_iter(f"{served.prefix}:*", count=1000, _type="string")}
        yield client
        client.mset(before)


def test_both_pass_on_a_service_that_is_right(served: Served) -> None:
    replayed, compared = served.replay(), served.fidelity()
    assert (replayed.exit_code, compared.exit_code) == (0, 0)
    assert orjson.loads(replayed.stdout).keys() == {
        "requests", "candidates", "auc", "gauc", "auc_offline", "gauc_offline", "max_abs_diff_offline", "user_states",
        "latency_ms",
    }  # fmt: skip
    assert orjson.loads(compared.stdout).keys() == {"users", "candidates", "max_abs_diff", "max_abs_diff_unquantised"}
    assert compared.stderr == ""


def test_both_ask_with_the_key_of_the_environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"key_prefix": served.prefix, "bundles_dir": served.folder / "bundles"}
    key = f"tester score sha256:{hashlib.sha256(b'the key').hexdigest()}"
    with running_service(store_url=served.store, api_keys=key, **settings) as client:
        asking = replace(served, url=str(client.base_url))
        assert_refused(asking.replay(), "found 401 ")
        refused = asking.fidelity()
        assert (refused.exit_code, "401 Unauthorized" in refused.stderr) == (1, True)
        monkeypatch.setenv("LREA_LOADTEST_API_KEY", "the key")
        assert (asking.replay().exit_code, asking.fidelity(users=3).exit_code) == (0, 0)


def test_fewer_users_and_candidates_may_be_compared(served: Served) -> None:
    found = orjson.loads(served.fidelity(users=3, candidates=7).stdout)
    assert (found["users"], found["candidates"]) == (3, 7)


def test_a_service_of_another_model(served: Served) -> None:
    (folder,) = (served.folder / "others").iterdir()
    assert_refused(
        served.fidelity(bundle=folder),
        f"the service serves {served.bundle.model_id}, --bundle is {folder.name}: name that one",
    )
    refused = served.replay("others.parquet")
    assert_refused(refused, f"the service serves {served.bundle.model_id}")
    assert f"was judged by {folder.name}" in refused.stderr


def test_a_user_who_is_not_cached(served: Served, records: Any) -> None:
    records.delete(served.key())
    assert_refused(served.fidelity(), f"user {USER} is empty, wanted cached: build the cache as of T")
    replayed = orjson.loads(served.replay().stdout)
    his = sum(user == USER for user in pq.read_table(served.folder / "samples.parquet")["user_id"].to_pylist())
    assert his > 0
    assert replayed["user_states"] == {"cached": replayed["requests"] - his, "empty": his}
    assert replayed["max_abs_diff_offline"] > 3e-3


def test_a_degraded_answer(served: Served, records: Any) -> None:
    records.set(served.key(), b"not a record")
    assert_refused(served.replay(), f"user {USER}: degraded ['record_corrupt']: is the store up?")
    assert_refused(served.fidelity(), f"user {USER} is empty, wanted cached")


def test_a_record_that_the_model_did_not_make(served: Served, records: Any) -> None:
    """Well formed, so that the service cannot know; only the comparison with the history itself shows it."""
    names = {"model_id": served.bundle.model_id, "generation": served.generation}
    shape = served.bundle.record_shape
    record = decode(records.get(served.key()), user_id=USER, shape=shape, **names)
    wrong = replace(record, values_RD=record.values_RD + 1)
    records.set(served.key(), encode(wrong, shape=shape, precision="float16"))
    result = served.fidelity()
    assert result.exit_code == 1
    assert result.stderr == "error: the service does not answer with the trained model's scores\n"
    found = orjson.loads(result.stdout)
    assert found["max_abs_diff"] <= 1e-4
    assert found["max_abs_diff_unquantised"] > 3e-3


def test_another_store_than_the_service_s(served: Served) -> None:
    assert_refused(served.fidelity(key_prefix="nothing-here"), "found no key nothing-here:")
    assert_refused(served.fidelity(store="redis://:secret@127.0.0.1:1/0"), "Error ")
    assert "secret" not in served.fidelity(store="redis://:secret@127.0.0.1:1/0").stderr


def test_no_user_to_compare_is_no_success(served: Served, tmp_path: Path) -> None:
    log = pq.read_table(served.folder / "data" / "interactions.parquet")
    later = tiny_data(tmp_path / "later")
    pq.write_table(log.filter(log["timestamp"].to_numpy() >= AS_OF), later / "interactions.parquet")
    assert_refused(served.fidelity(data=later), "found no user with a behaviour as of T")


def test_another_t_than_the_cache_s(served: Served) -> None:
    assert_refused(served.fidelity(as_of=0), f"the cache was built as of {AS_OF}, --as-of is 0: leave it out")


def test_nobody_listens(served: Served) -> None:
    assert_refused(served.fidelity(url="http://127.0.0.1:1"), "refused")
    assert_refused(served.replay(url="http://127.0.0.1:1"), "refused")


@pytest.mark.parametrize("what", ["missing", "junk", "of another tool", "without requests", "without labels"])
def test_samples_that_cannot_be_replayed(served: Served, tmp_path: Path, what: str) -> None:
    path, samples = tmp_path / "samples.parquet", pq.read_table(served.folder / "samples.parquet")
    messages = {
        "missing": str(path),
        "junk": str(path),
        "of another tool": "is not what `python -m model evaluate",
        "without requests": "has no requests",
        "without labels": "is not what `python -m model evaluate",
    }
    match what:
        case "junk":
            path.write_bytes(b"junk")
        case "of another tool":
            pq.write_table(pa.table({"a": [1]}), path)
        case "without requests":
            pq.write_table(samples.slice(0, 0), path)
        case "without labels":
            pq.write_table(samples.drop_columns(["labels"]), path)
    assert_refused(served.replay(path), messages[what])


def test_a_service_before_the_first_build(served: Served) -> None:
    """It scores everybody as unknown, and says that it does."""
    prefix = f"{served.prefix}-empty"
    with running_service(store_url=served.store, key_prefix=prefix, bundles_dir=served.folder / "bundles") as client:
        url = str(client.base_url)
        assert httpx.get(f"{url}/v1/model").json()["generation"] is None
        assert_refused(served.replay(url=url), "degraded ['no_active_generation']")
        assert_refused(served.fidelity(url=url, key_prefix=prefix), "serves no generation")


def test_every_user_of_the_world_was_compared(served: Served) -> None:
    found = orjson.loads(served.fidelity().stdout)
    assert found["users"] == USERS
    assert not math.isnan(found["max_abs_diff"])
    with Redis.from_url(served.store) as client:
        assert client.exists(active_key(served.prefix))
