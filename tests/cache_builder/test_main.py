"""The commands as a person or a scheduler runs them: exit codes, the JSON line, and one message per failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from cache_builder.__main__ import app
from cache_builder.lock import BuildLock
from cache_builder.publish import read_active
from cache_builder.store import Store
from model.cache_format import Published, active_key, lock_key, manifest_key
from tests.cache_builder.conftest import World
from tests.cache_builder.proxy import proxy
from tests.conftest import free_port
from tests.tiny import AS_OF, TRAINING, tiny_bundle


def in_a_work_folder(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Of its own, where a build names none."""
    if arguments[0] != "build" or "--work" in arguments:
        return ()
    return ("--work", tempfile.mkdtemp(prefix="lrea-work-"))


def run(*arguments: object, **environment: str) -> Result:
    arguments += in_a_work_folder(arguments)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def build_arguments(world: World, store_url: str, prefix: str) -> list[object]:
    where = ["--bundle", world.bundle_folder, "--data", world.data, "--store", store_url, "--key-prefix", prefix]
    return [*where, "--device", "cpu"]


def last_line(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_build_then_verify_then_status(world: World, store_url: str, key_prefix: str, tmp_path: Path) -> None:
    arguments = build_arguments(world, store_url, key_prefix)
    metrics = tmp_path / "lrea.prom"
    built = run(
        "build", *arguments, "--as-of", AS_OF, "--precision", "int8", "--max-write-mb-s", 50, "--metrics-file", metrics
    )
    assert built.exit_code == 0, built.stderr
    summary = last_line(built)
    assert list(summary) == [
        "model_id", "generation", "published", "epoch", "as_of", "precision", "users", "copied", "rows", "bad_rows",
        "record_bytes", "bytes_per_user", "seconds", "users_per_s", "gate",
    ]  # fmt: skip
    assert (summary["model_id"], summary["as_of"], summary["precision"]) == (world.bundle.model_id, AS_OF, "int8")
    users = summary["users"]
    assert f'lrea_build_users{{key_prefix="{key_prefix}"}} {users}' in metrics.read_text()
    assert run("build", *arguments, "--as-of", 1, "--metrics-file", metrics).exit_code == 1
    assert f'lrea_build_succeeded{{key_prefix="{key_prefix}"}} 0' in metrics.read_text()
    assert f"write: {users} of {users} users" in built.stderr
    assert f"verify: {users} of {users} users" in built.stderr

    verified = run("verify", *arguments, "--as-of", AS_OF)
    assert last_line(verified) == {
        "model_id": world.bundle.model_id, "generation": summary["generation"], "users": users, "verified": True
    }  # fmt: skip

    status = run("status", LREA_STORE_URL=store_url, LREA_KEY_PREFIX=key_prefix)
    assert status.exit_code == 0
    assert last_line(status)["active"]["current"]["generation"] == summary["generation"]
    assert last_line(status)["current"]["record_bytes"] == summary["record_bytes"]
    assert f"{users} users" in status.stderr
    assert "building  nobody" in status.stderr


def test_hold_then_publish_then_gc(world: World, store_url: str, key_prefix: str) -> None:
    where = ("--store", store_url, "--key-prefix", key_prefix)
    held = last_line(run("build", *build_arguments(world, store_url, key_prefix), "--hold"))
    assert (held["published"], held["epoch"]) == (False, None)
    assert run("publish", *where, "--generation", "gen-x").stderr == (
        f"error: generation 'gen-x' is not held: there is {held['generation']}\n"
    )
    published = run("publish", *where)
    assert published.exit_code == 0
    assert f"count: {held['users']} of {held['users']} users" in published.stderr
    assert last_line(published)["current"]["generation"] == held["generation"]
    name = f"{held['model_id']}:{held['generation']}"
    kept = {"kept": {name: held["users"] + 1}, "expiring": {}, "deleted": {}}
    assert last_line(run("gc", *where)) == last_line(run("gc", *where, "--now", "--held")) == kept
    assert run("publish", *where).exit_code == 1


def test_status_of_nothing(store_url: str, key_prefix: str) -> None:
    found = run("status", "--store", store_url, "--key-prefix", key_prefix)
    assert found.stderr.splitlines() == ["nothing is published", "building  nobody"]
    nothing: dict[str, Any] = dict.fromkeys(("active", "current", "previous", "building", "lock_ends_in_s"))
    assert last_line(found) == nothing | {"held": [], "unpublished": []}


def test_status_names_the_builder_and_what_was_interrupted(store: Store, store_url: str, key_prefix: str) -> None:
    lock = BuildLock(store, key_prefix, Published("3f2a00c0ffee", "gen-a"))
    lock.acquire()
    during = run("status", "--store", store_url, "--key-prefix", key_prefix)
    lock.release()
    after = run("status", "--store", store_url, "--key-prefix", key_prefix)
    assert f":{os.getpid()} building gen-a of model 3f2a00c0ffee since" in last_line(during)["building"]
    left = last_line(during)["lock_ends_in_s"]
    assert 30 < left <= 60
    assert f"its lock ends in {left} s; a builder that lives renews it every 15 s" in during.stderr
    assert last_line(after)["lock_ends_in_s"] is None
    assert "leftover  gen-a: of builds that did not end" in after.stderr
    assert last_line(after)["unpublished"] == ["3f2a00c0ffee:gen-a"]


def test_status_shows_what_was_current_before_and_that_a_manifest_is_missing(
    world: World, store_url: str, key_prefix: str, admin: Any
) -> None:
    built = [last_line(run("build", *build_arguments(world, store_url, key_prefix))) for _ in range(2)]
    admin.delete(manifest_key(key_prefix, built[0]["model_id"], built[0]["generation"]))
    lines = run("status", "--store", store_url, "--key-prefix", key_prefix).stderr.splitlines()
    assert lines[0].startswith(f"current   {built[1]['generation']} of model {world.bundle.model_id}: 30 users")
    assert lines[0].endswith("epoch 2")
    assert lines[1].startswith(f"previous  {built[0]['generation']}")
    assert lines[1].endswith("its manifest is missing, build again")


def test_the_published_model_is_looked_for_beside_the_new_one(
    world: World, store_url: str, key_prefix: str, tmp_path: Path
) -> None:
    beside = shutil.copytree(world.bundle_folder, tmp_path / "bundles" / world.bundle.model_id)
    other = tiny_bundle(tmp_path / "bundles", world.data, training=replace(TRAINING, seed=5))
    first, second, third = (
        build_arguments(replace(world, bundle_folder=folder), store_url, key_prefix)
        for folder in (world.bundle_folder, tmp_path / "bundles" / other.model_id, beside)
    )
    assert run("build", *first).exit_code == 0
    assert last_line(run("build", *second))["gate"]["score_drift"] > 0
    failed = run("build", *third, "--previous-bundle", world.bundle_folder)
    assert failed.exit_code == 1
    assert (
        f"is model {world.bundle.model_id}, published is {other.model_id}: give the bundle of that one" in failed.stderr
    )
    assert last_line(run("build", *third, "--previous-bundle", tmp_path / "bundles" / other.model_id))["epoch"] == 3


def test_rollback_publishes_the_generation_before(world: World, store_url: str, key_prefix: str) -> None:
    old, bad = (last_line(run("build", *build_arguments(world, store_url, key_prefix))) for _ in range(2))
    where = ["--store", store_url, "--key-prefix", key_prefix]
    found = run("rollback", *where, "--generation", old["generation"])
    assert found.exit_code == 0, found.stderr
    assert f"count: {old['users']} of {old['users']} users" in found.stderr
    assert last_line(found)["current"]["generation"] == old["generation"]
    assert last_line(found)["previous"]["generation"] == bad["generation"]
    assert last_line(found)["epoch"] == 3
    assert last_line(run("status", *where))["active"] == last_line(found)


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(world: World, store_url: str, key_prefix: str, limit: str) -> None:
    failed = run("build", *build_arguments(world, store_url, key_prefix), f"--max-write-mb-s={limit}")
    assert failed.exit_code == 1
    assert f"--max-write-mb-s is {limit}: wanted more than 0" in failed.stderr


@pytest.mark.parametrize("command", ["status", "rollback"])
def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, command: str) -> None:
    failed = run(command, "--store", f"embedded:{tmp_path / 'typo'}")
    assert failed.exit_code == 1
    assert (
        failed.stderr
        == f"error: {tmp_path / 'typo'} is not a folder: give the one that a build has made, or a redis:// URL\n"
    )
    assert not (tmp_path / "typo").exists()


def test_an_embedded_store_needs_no_server(world: World, tmp_path: Path, key_prefix: str) -> None:
    arguments = build_arguments(world, f"embedded:{tmp_path / 'store'}", key_prefix)
    summary = last_line(run("build", *arguments))
    assert last_line(run("verify", *arguments))["generation"] == summary["generation"]
    assert last_line(run("build", *arguments))["epoch"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--bundle": "nowhere"}, "nowhere is not a bundle"),
        ({"--data": "nowhere"}, "nowhere is not there: give a folder that holds interactions.parquet"),
        ({"--store": "redis://user:secret@127.0.0.1:1/0"}, "store redis://127.0.0.1:1/0 did not answer"),
        ({"--store": "127.0.0.1:6379"}, "wanted redis://host:port"),
        ({"--key-prefix": "a b"}, "key prefix 'a b' is not valid"),
        ({"--precision": "float8"}, "precision 'float8' is unknown: wanted one of float32, float16, int8, bfloat16"),
        ({"--device": "tpu"}, "device 'tpu' is unknown: wanted auto, cpu, cuda"),
        ({"--as-of": AS_OF - 1}, "is before the training cut"),
    ],
)
def test_a_refused_build_says_why_in_one_line(
    world: World, store_url: str, key_prefix: str, changes: dict[str, object], message: str
) -> None:
    arguments = build_arguments(world, store_url, key_prefix)
    options = dict(zip(arguments[::2], arguments[1::2], strict=True)) | changes
    failed = run("build", *(part for option in options.items() for part in option))
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert "secret" not in failed.stderr


def is_text(path: Path) -> None:
    path.write_text("user_id,region")


def with_column(path: Path, name: str, values: Callable[[int], pa.Array]) -> None:
    table = pq.read_table(path)
    kept = table.drop_columns([name]) if name in table.column_names else table
    pq.write_table(kept.append_column(name, values(table.num_rows)), path)


def is_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


LARGE = 2**63 + 1  # fits in no int64
BAD_DATA: list[tuple[str, Callable[[Path], None], str]] = [
    ("interactions.parquet", is_a_folder, "holds no Parquet file: give a folder that holds interactions.parquet"),
    ("users.parquet", is_a_folder, "users.parquet"),
    ("users.parquet", is_text, "users.parquet is not a readable Parquet file"),
    ("interactions.parquet", lambda path: with_column(path, "label", lambda n: pa.array(["yes"] * n)), "label"),
    ("users.parquet", lambda path: with_column(path, "region", lambda n: pa.array(range(n))), "region"),
    ("users.parquet", lambda path: with_column(path, "region", lambda n: pa.array([0.5] * n)), "region"),
    ("users.parquet", lambda path: with_column(path, "region", lambda n: pa.array([LARGE] * n, pa.uint64())), "region"),
    ("users.parquet", lambda path: with_column(path, "region", lambda n: pa.array([["north"]] * n)), "region"),
]  # fmt: skip


@pytest.fixture(scope="session")
def regional(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model that reads a column of users.parquet."""
    folder = tmp_path_factory.mktemp("regional")
    bundle = tiny_bundle(folder, world.data, user_features=("region",))
    return World(world.data, world.log, folder / bundle.model_id, bundle)


@pytest.mark.parametrize(("file", "damage", "message"), BAD_DATA)
def test_data_that_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
    regional: World, tmp_path: Path, store_url: str, key_prefix: str, admin: Any, file: str,
    damage: Callable[[Path], None], message: str,
) -> None:  # fmt: skip
    data = tmp_path / "data"
    shutil.copytree(regional.data, data)
    damage(data / file)
    failed = run("build", *build_arguments(replace(regional, data=data), store_url, key_prefix))
    assert isinstance(failed.exception, SystemExit), failed.exception
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert list(admin.scan_iter(match=f"{key_prefix}:*", count=10_000)) == []


def test_verify_of_nothing_fails(world: World, store_url: str, key_prefix: str) -> None:
    failed = run("verify", *build_arguments(world, store_url, key_prefix))
    assert failed.exit_code == 1
    assert failed.stderr.startswith(f"error: nothing is published under '{key_prefix}'")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cache_builder", *map(str, arguments + in_a_work_folder(arguments))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_store_in_the_foreground_saves_when_it_is_stopped(tmp_path: Path, stop: signal.Signals) -> None:
    for number in range(2):
        port = free_port()
        process = start("store", "--dir", tmp_path, "--port", port)
        assert process.stderr is not None
        assert f"store on redis://127.0.0.1:{port}" in process.stderr.readline()
        with Redis(port=port) as client:
            assert client.incr("starts") == number + 1
        process.send_signal(stop)
        stdout, _ = process.communicate(timeout=20)
        assert json.loads(stdout) == {"store": f"redis://127.0.0.1:{port}", "saved": True}
        assert process.returncode == 0


LAST_RECORD, FLIP = b":u:39", b"'flipped'"


def build_until(
    request: bytes, world: World, store_url: str, prefix: str, stop: Callable[[subprocess.Popen[str]], None]
) -> tuple[subprocess.Popen[str], str, str]:
    """Start a build and stop it when the store has done what was requested and before it hears of that.

    Once: the deletion that follows names the same records, and a second Ctrl-C would interrupt that.
    """
    started: list[subprocess.Popen[str]] = []
    stops = iter([stop])

    def meddle() -> bool:
        time.sleep(0.2)
        for stop_once in stops:
            stop_once(started[0])
        time.sleep(0.2)
        return False

    with proxy(store_url, request, meddle) as url:
        started.append(start("build", *build_arguments(world, url, prefix)))
        stdout, stderr = started[0].communicate(timeout=30)
    return started[0], stdout, stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_says_how_to_go_on(
    world: World, store_url: str, key_prefix: str, admin: Any, stop: signal.Signals
) -> None:
    process, stdout, stderr = build_until(
        LAST_RECORD, world, store_url, key_prefix, lambda running: running.send_signal(stop)
    )
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "is not whole: --resume goes on, a build without deletes it" in stderr.splitlines()[-2]
    assert not admin.exists(lock_key(key_prefix), active_key(key_prefix))
    assert list(admin.scan_iter(match=f"{key_prefix}:*:u:*", count=10_000))


def test_a_build_that_is_stopped_as_it_publishes_says_that_it_has(
    world: World, store_url: str, key_prefix: str, store: Store
) -> None:
    process, stdout, stderr = build_until(
        FLIP, world, store_url, key_prefix, lambda running: running.send_signal(signal.SIGINT)
    )
    assert (process.returncode, stdout) == (130, "")
    assert "had been published when this was interrupted: it stays" in stderr
    assert last_line(run("verify", *build_arguments(world, store_url, key_prefix)))["verified"]
    pointer = read_active(store, key_prefix)
    assert pointer is not None
    assert pointer.current.generation in stderr


def test_a_killed_build_is_cleaned_up_by_the_next_one(
    world: World, store_url: str, key_prefix: str, admin: Any
) -> None:
    process, _, _ = build_until(LAST_RECORD, world, store_url, key_prefix, lambda running: running.kill())
    assert process.returncode == -signal.SIGKILL
    left = list(admin.scan_iter(match=f"{key_prefix}:*:u:*", count=10_000))
    assert len(left) > 0
    refused = run("build", *build_arguments(world, store_url, key_prefix))
    assert refused.exit_code == 1
    assert f":{process.pid} building" in refused.stderr
    admin.delete(f"{key_prefix}:lock:{{{key_prefix}:active}}")  # it would expire
    built = run("build", *build_arguments(world, store_url, key_prefix))
    assert built.exit_code == 0
    assert "which was never published" in built.stderr
    head = f"{key_prefix}:{world.bundle.model_id}:{last_line(built)['generation']}:"
    records = list(admin.scan_iter(match=f"{key_prefix}:*:u:*", count=10_000))
    assert len(records) == last_line(built)["users"]
    assert all(key.decode().startswith(head) for key in records)
