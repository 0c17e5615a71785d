"""Following the store's active pointer while serving: warm up, ask once per poll, swap when what is published changes.

A request keeps the model it began with; only later ones see the new one.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.bundle import Bundle
from model.cache_format import ManifestError, Published
from model.identifiers import Id
from model.ranker import ScoringInput
from service.active import NO_ACTIVE_GENERATION, ActiveModel, Placement, activate, find_manifest, open_bundle
from service.errors import PublicationError, StoreError
from service.metrics import Metrics
from service.store import Store
from service.user_cache import UserCache

logger = logging.getLogger(__name__)
WARM_UP_CANDIDATES = 1000
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
        metrics: Metrics,
        user_cache: UserCache,
        poll_s: float,
    ) -> None:
        self.current = model
        self.ready = False  # warm
        self._store = store
        self._bundles_dir = bundles_dir
        self._placement = placement
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
            await asyncio.to_thread(warm_up, self.current.bundle)
            self.ready = True

    async def poll(self) -> None:
        """Ask once what is published, and swap to it if it is new and can be served."""
        published: Published | None = None
        try:
            pointer = await self._store.read_active()
            published = pointer.current if pointer else None
            try:
                await self._follow(published)
            finally:
                await self._lease()
        except StoreError:
            pass  # the store remembers it, and has logged it
        except (ManifestError, PublicationError) as error:
            self._refuse(_Refusal(published, str(error), time.monotonic()), error.__cause__)
        except Exception as error:  # of what is published: then it is as bad as a broken bundle
            if published is None:
                raise
            self._refuse(_Refusal(published, f"{type(error).__name__}: {error}", time.monotonic()), error)

    async def _follow(self, published: Published | None) -> None:
        if published is None:
            self._adopt(ActiveModel(self.current.bundle, None))
        elif not self.current.is_(published):
            if self._refused and self._refused.published == published and time.monotonic() < self._refused.at + RETRY_S:
                return
            self._adopt(await self._load(published))
        self._refused = None

    async def _lease(self) -> None:
        """Let the builder know what is read, which need not be what is published."""
        if self.current.generation is not None:
            published = Published(self.current.model_id, self.current.generation)
            await self._store.lease(published, self._reader, LEASE_MS)

    async def _load(self, published: Published) -> ActiveModel:
        manifest = await find_manifest(self._store, published)
        bundle = self.current.bundle
        if published.model_id != bundle.model_id:
            bundle = await asyncio.to_thread(open_bundle, self._bundles_dir, published.model_id, self._placement)
            await asyncio.to_thread(warm_up, bundle)
        return activate(manifest, bundle)

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

    def _show(self) -> None:
        model = self.current
        logger.info("serving model %s, generation %s, on %s", model.model_id, model.generation, model.device)
        self._metrics.show_model(model.model_id, model.generation, str(model.device))

    def _show_store(self) -> None:
        """Also without a scrape: of several workers, only one answers it."""
        self._metrics.store_up.set(self._store.trouble is None)


def warm_up(bundle: Bundle) -> None:
    """One forward for a user and items that nobody knows, so that the first caller does not pay for first times.

    Raises PublicationError for a bundle that loads and cannot score, whatever it fails with, or scores no numbers.
    """
    try:
        finite = bool(torch.isfinite(_score_nobody(bundle)).all()) and all(map(_is_finite, bundle.ranker.parameters()))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise PublicationError(f"the bundle of model {bundle.model_id} loads and does not score: {found}") from error
    if not finite:
        raise PublicationError(
            f"the bundle of model {bundle.model_id} has weights or scores that are not finite: train it again"
        )


def _score_nobody(bundle: Bundle) -> Tensor:
    nobody: Id = 0 if bundle.item_kind == "int" else "warm-up"
    request = ScoringInput(
        state=bundle.empty_state,
        short=bundle.short_window([nobody]),
        user_codes=bundle.user_features.encode({}),
        context_codes=bundle.context_features.encode({}),
        candidates=bundle.catalogue.encode([nobody] * WARM_UP_CANDIDATES),
    )
    return bundle.serving.score(request.to(bundle.device))


def _is_finite(weights: Tensor) -> bool:
    return bool(torch.isfinite(weights).all())
