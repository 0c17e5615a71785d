"""What was read for parts of a batch and put together: everybody is himself, and all of it is given back once."""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from model.identifiers import Id
from service.active import ActiveModel
from service.metrics import Metrics
from service.store.reads import Store
from service.users.cache import UserCache
from service.users.lookup import Fetched, Found, UserLookup
from service.users.table import TableShape
from tests.service.cache import GENERATION, Cache
from tests.tiny import ITEMS, item_id, user_id

SLOTS = 4
USERS = [user_id("int", number) for number in range(1, 13)]
NOBODY = user_id("int", 99)


@dataclass
class World:
    cache: Cache
    model: ActiveModel
    lookup: UserLookup
    users: UserCache
    registry: CollectorRegistry
    alone: dict[Id, Found]  # each user, read by himself

    async def fetch(self, *user_ids: Id) -> Fetched:
        return await self.lookup.fetch(self.model, user_ids)

    def give_back(self, fetched: Fetched) -> None:
        self.lookup.unpin(fetched)
        self.lookup.let_go(fetched)

    def check(self, found: dict[Id, Found]) -> None:
        for one, is_found in found.items():
            truth = self.alone[one].user
            assert (is_found.user is None) == (truth is None)
            if is_found.user is not None and truth is not None:
                assert is_found.user.watermark == truth.watermark
                np.testing.assert_array_equal(is_found.user.short.rows.numpy(), truth.short.rows.numpy())

    def count(self, name: str) -> float:
        return self.registry.get_sample_value(f"lrea_user_cache_{name}") or 0.0

    async def assert_all_is_free(self) -> None:
        """Whoever is not resident is read anew, and every slot can be another user's."""
        self.users.activate(self.model)
        assert self.count("users") == 0
        self.cache.redis.delete(*(self.cache.key(one) for one in USERS))
        gone = await self.fetch(*USERS)
        assert set(gone.landed.payloads.values()) == {None}, "what was read before is still taken for the store's"
        self.give_back(gone)
        record = self.alone[USERS[0]].user
        assert record is not None
        admitted = [self.users.admit(self.model, user_id("int", 50 + number), record) for number in range(SLOTS)]
        assert None not in admitted, "a slot is still pinned, by nobody"


@pytest.fixture
async def world(cache: Cache) -> AsyncIterator[World]:
    cache.publish({one: [item_id("int", (int(one) + 7 * row) % ITEMS) for row in range(5 + int(one))] for one in USERS})
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    store = Store(cache.url, cache.prefix, timeout_s=5)
    users = UserCache(SLOTS * TableShape.of(cache.bundle).slot_bytes, 300, metrics)
    model = ActiveModel(cache.bundle, GENERATION)
    users.activate(model)
    plain = UserLookup(store, UserCache(0, 300, metrics), metrics)
    alone = plain.decode(await plain.fetch(model, [*USERS, NOBODY]))
    yield World(cache, model, UserLookup(store, users, metrics), users, registry, alone)
    await store.close()


async def test_who_was_read_and_has_become_resident_since_is_found_once(world: World) -> None:
    waiting = await world.fetch(USERS[0], USERS[1])
    before = await world.fetch(USERS[0])
    world.lookup.decode(before)  # makes him resident
    world.give_back(before)
    more = await world.fetch(USERS[0], NOBODY)
    assert set(more.pinned) == {USERS[0]}
    world.lookup.merge(waiting, more)
    found = world.lookup.decode(waiting)
    assert set(found) == {USERS[0], USERS[1], NOBODY}
    world.check(found)
    world.give_back(waiting)
    await world.assert_all_is_free()


async def test_who_is_pinned_in_both_is_released_in_both(world: World) -> None:
    first = await world.fetch(USERS[0])
    world.lookup.decode(first)
    world.give_back(first)
    waiting, more = await world.fetch(USERS[0]), await world.fetch(USERS[0], USERS[2])
    world.lookup.merge(waiting, more)
    world.check(world.lookup.decode(waiting))
    world.give_back(waiting)
    await world.assert_all_is_free()


async def test_whatever_is_put_together_all_is_found_and_given_back(world: World) -> None:
    rng = random.Random(7)
    waiting: list[Fetched] = []
    for _ in range(2000):
        step = rng.random()
        if step < 0.5 or not waiting:
            waiting.append(await world.fetch(*rng.sample([*USERS, NOBODY], rng.randint(1, 4))))
        elif step < 0.75 and len(waiting) > 1:
            more = waiting.pop(rng.randrange(len(waiting)))
            world.lookup.merge(rng.choice(waiting), more)
        elif step < 0.95:
            fetched = waiting.pop(rng.randrange(len(waiting)))
            world.check(world.lookup.decode(fetched))
            world.give_back(fetched)
        else:
            world.give_back(waiting.pop())
    for fetched in waiting:
        world.check(world.lookup.decode(fetched))
        world.give_back(fetched)
    await world.assert_all_is_free()
