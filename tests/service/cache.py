"""A cache written by hand, without the builder: records, manifest and pointer in a real store."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from redis import Redis

from model.bundle import Bundle, load_bundle
from model.cache_format import (
    FORMAT_VERSION,
    ActivePointer,
    Manifest,
    Published,
    UserRecord,
    active_key,
    decode,
    encode,
    manifest_key,
    record_key,
)
from model.identifiers import Id
from model.ranker import ScoringInput

Floats = npt.NDArray[np.float32]
GENERATION = "20260101T000000-000000"
WATERMARK = 5_000


@dataclass
class Cache:
    """One key prefix of one store, with the bundle whose users it holds."""

    url: str
    prefix: str
    bundles_dir: Path
    bundle: Bundle
    redis: Any = field(init=False)

    @classmethod
    def of_bundles(cls, url: str, prefix: str, bundles_dir: Path) -> "Cache":
        [folder] = [path for path in bundles_dir.iterdir() if path.is_dir()]
        return cls(url, prefix, bundles_dir, load_bundle(folder))

    def __enter__(self) -> "Cache":
        self.redis = Redis.from_url(self.url, protocol=2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.redis.close()

    def in_folder(self, bundles_dir: Path) -> "Cache":
        """The same cache, with its bundle to be found elsewhere."""
        other = Cache(self.url, self.prefix, bundles_dir, self.bundle)
        other.redis = self.redis
        return other

    def key(self, user_id: Id, generation: str = GENERATION) -> str:
        return record_key(self.prefix, self.bundle.model_id, generation, user_id)

    def record(self, user_id: Id, history: Sequence[Id], generation: str = GENERATION, **changes: Any) -> UserRecord:
        """The record of a user with this history, oldest first, one behaviour per tick up to the watermark."""
        config = self.bundle.config
        state = self.bundle.state_from_history(history)
        tail = list(history[-config.short_length :])
        facts: dict[str, Any] = {
            "model_id": self.bundle.model_id,
            "generation": generation,
            "user_id": user_id,
            "watermark": WATERMARK,
            "built_at_ms": int(time.time() * 1000),
            "long_rows": min(max(len(history) - config.short_length, 0), config.long_length),
            "keys_RD": state.keys_Rd.numpy(),
            "values_RD": state.values_Rd.numpy(),
            "sketch_M": state.sketch_M.numpy(),
            "tail_ids": tail,
            "tail_timestamps": np.arange(WATERMARK - len(tail) + 1, WATERMARK + 1, dtype=np.int64),
            "user_codes": np.full(self.bundle.record_shape.user_features, 2, np.int32),
        }
        return UserRecord(**facts | changes)

    def put(self, user_id: Id, history: Sequence[Id], generation: str = GENERATION, **changes: Any) -> None:
        """Store a user's record."""
        record = self.record(user_id, history, generation, **changes)
        data = encode(record, shape=self.bundle.record_shape, precision="float32")
        self.redis.set(self.key(user_id, generation), data)

    def publish(
        self, users: Mapping[Id, Sequence[Id]] | None = None, generation: str = GENERATION, **manifest: Any
    ) -> None:
        """Store records and manifest, then flip the pointer."""
        for user_id, history in (users or {}).items():
            self.put(user_id, history, generation)
        facts: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model_id": self.bundle.model_id,
            "generation": generation,
            "users": len(users or {}),
            "record_bytes": 0,
            "precision": "float32",
            "as_of": None,
            "built_at_ms": 0,
            "user_kind": self.bundle.user_kind,
            "shape": self.bundle.record_shape,
            "source": {},
            "versions": {},
        }
        self.redis.set(
            manifest_key(self.prefix, self.bundle.model_id, generation), Manifest(**facts | manifest).to_json()
        )
        self.point_at(self.bundle.model_id, generation)

    def point_at(self, model_id: str, generation: str) -> None:
        """Flip the pointer, whatever is there."""
        pointer = ActivePointer(Published(model_id, generation), None, 1)
        self.redis.set(active_key(self.prefix), pointer.to_json())

    def logits(
        self,
        user_id: Id,
        candidates: Sequence[Id],
        *,
        window: Sequence[Id] | None = None,
        context: Mapping[str, Id | None] | None = None,
        features: Mapping[str, Sequence[Id | None]] | None = None,
        generation: str = GENERATION,
    ) -> Floats:
        """What the model in process makes of the stored record. `window`: another short window, oldest first."""
        bundle = self.bundle
        record = decode(
            self.redis.get(self.key(user_id, generation)),
            model_id=bundle.model_id,
            generation=generation,
            user_id=user_id,
            shape=bundle.record_shape,
        )
        request = ScoringInput(
            state=bundle.state_from_record(record),
            short=bundle.short_window(record.tail_ids if window is None else window),
            user_codes=torch.from_numpy(record.user_codes).to(torch.int64),
            context_codes=bundle.context_features.encode(context or {}),
            candidates=bundle.catalogue.encode(candidates, features),
        )
        return np.asarray(bundle.ranker.score(request).numpy())

    def logits_of_history(self, history: Sequence[Id], candidates: Sequence[Id]) -> Floats:
        """What the model in process makes of a user who is known by this history only."""
        bundle = self.bundle
        request = ScoringInput(
            state=bundle.state_from_history(history),
            short=bundle.short_window(history),
            user_codes=bundle.user_features.encode({}),
            context_codes=bundle.context_features.encode({}),
            candidates=bundle.catalogue.encode(candidates),
        )
        return np.asarray(bundle.ranker.score(request).numpy())


def logit(probabilities: Sequence[float]) -> npt.NDArray[np.float64]:
    values = np.asarray(probabilities, dtype=np.float64)
    return np.log(values / (1 - values))
