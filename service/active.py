"""What is served: a bundle and a generation of its cache. Chosen at the start, then following the store's pointer.

A publication that cannot be served (its bundle is not here, or does not load, or the cache does not fit it) is refused,
logged and counted, and the old one stays.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from model.bundle import Bundle, BundleError, load_bundle
from model.cache_format import Manifest, ManifestError, Published, is_model_id
from model.serving_error import logit_error
from service.errors import PublicationError, StartupError, StoreError
from service.store.reads import Store
from service.tasks import in_daemon_thread

logger = logging.getLogger(__name__)
NO_ACTIVE_GENERATION = "no_active_generation"  # why scores are degraded when the store names none


@dataclass(frozen=True, eq=False)
class ActiveModel:
    """One bundle, with the generation of the cache that goes with it (None: no cache, everybody is a miss)."""

    bundle: Bundle
    generation: str | None

    @property
    def model_id(self) -> str:
        return self.bundle.model_id

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    def is_(self, published: Published) -> bool:
        return (self.model_id, self.generation) == (published.model_id, published.generation)


@dataclass(frozen=True)
class Placement:
    """Where and in what numbers a model is to be served."""

    device: torch.device
    dtype: torch.dtype
    max_logit_error: float  # of a dtype other than float32; one that is further off is not served


async def choose(store: Store, bundles_dir: Path, pinned: str | None, placement: Placement) -> ActiveModel:
    """What to serve first: what the store says is active; where it says nothing, the pinned or the only bundle.

    Raises StartupError, with what to do, when that leaves nothing to serve.
    """
    try:
        pointer = await store.read_active()
        if pointer is not None:
            manifest = await find_manifest(store, pointer.current)
            bundle = await in_daemon_thread(open_bundle, bundles_dir, pointer.current.model_id, placement)
            if pinned not in (None, bundle.model_id):
                logger.warning(
                    "LREA_MODEL_ID is %s and has no effect: the store says that model %s is active, which is served",
                    *(pinned, bundle.model_id),
                )
            return activate(manifest, bundle)
        logger.warning("nothing is published in the store, every user is a miss until it is: see LREA_KEY_PREFIX")
    except (ManifestError, PublicationError) as error:
        raise StartupError(f"what the store says is active cannot be served: {error}") from error
    except StoreError as error:
        logger.warning("starting without the store, every user is a miss until it answers: %s", error)
    model_id = pinned or _only_bundle(bundles_dir)
    try:
        return ActiveModel(await in_daemon_thread(open_bundle, bundles_dir, model_id, placement), None)
    except PublicationError as error:
        raise StartupError(str(error)) from error


def open_bundle(bundles_dir: Path, model_id: str, placement: Placement) -> Bundle:
    """The bundle of `model_id`. Raises PublicationError."""
    folder = bundles_dir / model_id
    try:
        bundle = load_bundle(folder, placement.device) if folder.is_dir() else None
    except BundleError as error:
        raise PublicationError(f"the bundle at {folder} does not load: {error}") from error
    except Exception as error:  # a full GPU, a folder without permission, what a file of another version brings
        raise PublicationError(f"the bundle at {folder} does not load: {type(error).__name__}: {error}") from error
    if bundle is None:
        raise PublicationError(
            f"there is no bundle at {folder}: put the trained bundle of model {model_id} there, "
            "or publish a cache of a model that is there (python -m cache_builder build)"
        )
    if bundle.model_id != model_id:
        raise PublicationError(f"the bundle at {folder} is model {bundle.model_id}: name its folder after that")
    if not bundle.config.cacheable:
        raise PublicationError(
            f"model {model_id} cannot be served: its long attention {bundle.config.long_attention} reads the whole "
            'history for every candidate; train one with long_attention = "lrea" (or "none")'
        )
    return _in_dtype(bundle, placement)


def _in_dtype(bundle: Bundle, placement: Placement) -> Bundle:
    """The bundle to be served in the wanted dtype, or in float32 where that moves its logits too far."""
    if placement.dtype == torch.float32:
        return bundle
    try:
        error = logit_error(bundle, placement.dtype)
    except Exception as problem:  # whatever a model fails with that loads and cannot score
        found = f"{type(problem).__name__}: {problem}"
        raise PublicationError(f"model {bundle.model_id} cannot be scored in {placement.dtype}: {found}") from problem
    if not error <= placement.max_logit_error:
        logger.warning(
            "model %s is served in float32: %s moves its logits by up to %.1e, and LREA_MAX_LOGIT_ERROR is %.1e",
            *(bundle.model_id, placement.dtype, error, placement.max_logit_error),
        )
        return bundle
    logger.info("model %s is served in %s, logits within %.1e", bundle.model_id, placement.dtype, error)
    return replace(bundle, serving_dtype=placement.dtype)


async def find_manifest(store: Store, published: Published) -> Manifest:
    """The manifest of `published`. Raises PublicationError or StoreError."""
    what = f"generation {published.generation} of model {published.model_id}"
    key = store.manifest_key(published.model_id, published.generation)
    try:
        manifest = await store.read_manifest(published.model_id, published.generation)
    except ManifestError as error:
        raise PublicationError(f"{what} has a bad manifest at {key}: {error}") from None
    if manifest is None:
        raise PublicationError(f"{what} has no manifest at {key}: build the cache again")
    if (manifest.model_id, manifest.generation) != (published.model_id, published.generation):
        found = f"generation {manifest.generation} of model {manifest.model_id}"
        raise PublicationError(f"{what} has the manifest of {found} at {key}: build the cache again")
    return manifest


def activate(manifest: Manifest, bundle: Bundle) -> ActiveModel:
    """The bundle with the generation that the manifest describes. Raises PublicationError if they do not fit."""
    found = {"model_id": manifest.model_id, "user_kind": manifest.user_kind, **asdict(manifest.shape)}
    wanted = {"model_id": bundle.model_id, "user_kind": bundle.user_kind, **asdict(bundle.record_shape)}
    odd = [f"{name} {found[name]} (the bundle's: {wanted[name]})" for name in wanted if found[name] != wanted[name]]
    if odd:
        raise PublicationError(
            f"generation {manifest.generation} of model {manifest.model_id} was built for {', '.join(odd)}: "
            "build the cache with this bundle"
        )
    return ActiveModel(bundle, manifest.generation)


def _only_bundle(bundles_dir: Path) -> str:
    """The model_id of the one bundle in `bundles_dir`. Raises StartupError if there is none, or a choice."""
    # A bundle that is still being written has a name of another form.
    found = sorted(path.parent.name for path in bundles_dir.glob("*/config.json") if is_model_id(path.parent.name))
    if not found:
        raise StartupError(
            f"no bundle in {bundles_dir}: train one (python -m model train --out {bundles_dir}), or set "
            "LREA_BUNDLES_DIR to where they are"
        )
    if len(found) > 1:
        raise StartupError(
            f"the store does not say what is active, and {bundles_dir} has {len(found)} bundles ({', '.join(found)}): "
            "build a cache of one (python -m cache_builder build), or name one in LREA_MODEL_ID"
        )
    return found[0]
