"""Following the store's active pointer while serving: warm up, ask once per poll, swap when what is published changes.

A request keeps the model it began with; only later ones see the new one.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model.bundle import Bundle
from model.cache_format import ManifestError, Published
from service.active import (
    NO_ACTIVE_GENERATION,
    ActiveModel,
    Placement,
    activate,
    find_manifest,
    open_bundle,
)
from service.batching.compute_thread import ComputeThread
from service.errors import PublicationError, StoreError
from service.metrics import Metrics
from service.publication.sample import SAMPLE_USERS, check_records
from service.publication.warm_up import forwards, make_ready
from service.store.reads import Store
from service.tasks import in_daemon_thread
from service.users.cache import UserCache

logger = logging.getLogger(__name__)
PUBLICATION_REFUSED = "publication_refused"
LEASE_MS = 60_000  # renewed with every poll; a builder that finds none lets the generation expire, in hours
RETRY_S = 30.0  # loading a bundle that does not fit is too much work for every poll


@dataclass(frozen=True)
class _Refusal:
    published: Published | None  # None: the pointer itself cannot be read
    message: str
    at: float


class ModelFollower:
    """`current` is what new requests are scored with."""

    def __init__(
        self,
        model: ActiveModel,
        *,
        store: Store,
        bundles_dir: Path,
        placement: Placement,
        compute_thread: ComputeThread,
        metrics: Metrics,
        user_cache: UserCache,
        poll_s: float,
    ) -> None:
        """compute_thread: on which batches are scored; a new model is warmed up between two of them."""
        self.current = model
        self.ready = False  # warm
        self._store = store
        self._bundles_dir = bundles_dir
        self._placement = placement
        self._compute_thread = compute_thread
        self._metrics = metrics
        self._user_cache = user_cache
        self._poll_s = poll_s
        self._refused: _Refusal | None = None
        self._reader = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        user_cache.activate(model)
        self._show()
        self._show_store()

    def degraded(self) -> list[str]:
        """What is wrong while the service goes on answering."""
        if self._store.trouble is not None:
            return [self._store.trouble.reason]
        reasons = [] if self.current.generation is not None else [NO_ACTIVE_GENERATION]
        return reasons if self._refused is None else [*reasons, PUBLICATION_REFUSED]

    async def run(self) -> None:
        """Warm up, then poll until cancelled."""
        while True:
            try:
                await self.warm_up()
                await self.poll()
            except Exception:
                logger.exception("following the store failed; trying again in %s s", self._poll_s)
            self._show_store()
            await asyncio.sleep(self._poll_s)

    async def warm_up(self) -> None:
        """Make it `ready`, if it is not. Raises PublicationError for a model that cannot score."""
        if not self.ready:
            await self._warm_up(self.current.bundle)
            self.ready = True

    async def _warm_up(self, bundle: Bundle) -> None:
        await in_daemon_thread(make_ready, bundle)
        for forward in forwards(bundle):
            await self._compute_thread.submit(forward)

    async def poll(self) -> None:
        """Ask once what is published, and swap to it if it is new and can be served."""
        with suppress(StoreError):  # which the store remembers, and has logged
            try:
                published = await self._published()
            except ManifestError as error:
                self._refuse(_Refusal(None, str(error), time.monotonic()), None)
            else:
                await self._follow_or_refuse(published)
            await self._lease()

    async def _follow_or_refuse(self, published: Published | None) -> None:
        try:
            await self._follow(published)
        except StoreError:
            pass  # as above; what is served is leased all the same
        except PublicationError as error:
            self._refuse(_Refusal(published, str(error), time.monotonic()), error.__cause__)
        except Exception as error:  # of what is published: then it is as bad as a broken bundle
            if published is None:
                raise
            self._refuse(_Refusal(published, f"{type(error).__name__}: {error}", time.monotonic()), error)

    async def _published(self) -> Published | None:
        pointer = await self._store.read_active()
        return pointer.current if pointer else None

    async def _follow(self, published: Published | None) -> None:
        if published is None:
            self._adopt(ActiveModel(self.current.bundle, None))
        elif not self.current.is_(published):
            if self._refused and self._refused.published == published and time.monotonic() < self._refused.at + RETRY_S:
                return
            model = await self._load(published)
            if await self._published() != published:
                return  # while this was loaded another took its place, and is seen by the next poll
            self._adopt(model)
        self._accept(published)

    async def _lease(self) -> None:
        """Let the builder know what is read, which need not be what is published."""
        if self.current.generation is not None:
            published = Published(self.current.model_id, self.current.generation)
            await self._store.lease(published, self._reader, LEASE_MS)

    async def _load(self, published: Published) -> ActiveModel:
        manifest = await find_manifest(self._store, published)
        bundle = self.current.bundle
        if manifest.user_kind == bundle.user_kind:
            await check_records(self._store, manifest, self._user_cache.residents(SAMPLE_USERS))
        if published.model_id == bundle.model_id:
            return activate(manifest, bundle)
        bundle = await in_daemon_thread(open_bundle, self._bundles_dir, published.model_id, self._placement)
        model = activate(manifest, bundle)
        await self._warm_up(bundle)
        return model

    def _adopt(self, model: ActiveModel) -> None:
        """Serve `model` from the next request on. An emptied store names nothing: then there is no cache to ask."""
        if (model.model_id, model.generation) != (self.current.model_id, self.current.generation):
            self.current = model
            self._user_cache.activate(model)
            self._show()

    def _refuse(self, refusal: _Refusal, cause: BaseException | None) -> None:
        """Count and log a refusal when it is new, not whenever it is met again."""
        if self._refused is None or self._refused.message != refusal.message:
            message = "what is published cannot be served, the old generation stays: %s"
            logger.error(message, refusal.message, exc_info=cause)
            self._metrics.refused_publications.inc()
        self._refused = refusal

    def _accept(self, published: Published | None) -> None:
        """Log the end of a refusal: the line before said that something is wrong."""
        if self._refused is not None:
            what = "nothing" if published is None else f"model {published.model_id}, generation {published.generation}"
            logger.info("what is published is served again: %s", what)
        self._refused = None

    def _show(self) -> None:
        model = self.current
        logger.info("serving model %s, generation %s, on %s", model.model_id, model.generation, model.device)
        self._metrics.show_model(model.model_id, model.generation, str(model.device))

    def _show_store(self) -> None:
        """Also without a scrape: of several workers, only one answers it."""
        self._metrics.store_up.set(self._store.trouble is None)
