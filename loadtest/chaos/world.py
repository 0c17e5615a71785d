"""A model, a store with its users, a service in front, and the truth about them: what most scenarios need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

import torch

from loadtest.chaos.processes import Service, Store, become_the_generator, running_service, running_store
from loadtest.chaos.scenario import Site
from loadtest.chaos.truth import Truth
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish
from model.bundle import Bundle

PREFIX = "chaos"


@dataclass(frozen=True)
class World:
    """All of it, running."""

    store: Store
    service: Service
    bundle: Bundle
    truth: Truth


@contextmanager
def running_world(
    site: Site, shape: Shape, sizes: Sequence[int], settings: Mapping[str, object] | None = None
) -> Iterator[World]:
    """A service that is ready, and the truth about all of `shape`'s users and one list of candidates of each size.

    settings: the service's, by name and without LREA_, beside those that say where its parts are.
    """
    become_the_generator(site.load_core)  # and so does the store
    torch.set_num_threads(1)
    with ExitStack() as stack:
        store = stack.enter_context(running_store(site.folder / "store"))
        bundle = make_bundle(site.folder / "bundles", shape)
        publish(store.url, PREFIX, bundle, shape)
        truth = Truth(shape.user_ids, [Random(size).sample(shape.item_ids, size) for size in sizes])
        truth.add_stored(store.url, PREFIX, bundle, GENERATION)
        place = {"STORE_URL": store.url, "KEY_PREFIX": PREFIX, "BUNDLES_DIR": site.folder / "bundles"}
        chosen = {**place, **(settings or {})}
        service = stack.enter_context(running_service(chosen, site.server_core, site.folder / "service.log"))
        yield World(store, service, bundle, truth)
