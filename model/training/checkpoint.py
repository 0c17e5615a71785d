"""A checkpoint: everything that a training needs to go on as if it had not been interrupted, in one file.

A safetensors file; its header carries the facts as JSON and a digest over facts and tensors. It is written under
another name, flushed to disk and renamed, so an interruption leaves the older checkpoint or the newer one, never half
of one. No pickle. What is in it is the trainer's matter (`model.training.fit`); this file knows how to keep it.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
PERIOD_S = 300.0  # between checkpoints where no number of steps is named


class CheckpointError(ValueError):
    """A checkpoint that a training cannot go on from."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    facts: dict[str, Any]  # plain JSON
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointPlan:
    """Where and how often checkpoints are written, and whether to go on from one that is there."""

    folder: Path
    every_steps: int | None = None  # None: at each validation, and every five minutes
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"a checkpoint every {self.every_steps} steps: wanted at least 1")


@dataclass
class CheckpointFile:
    """The checkpoint of one training, named after what decides its result: others in the folder do not meet it."""

    folder: Path
    fingerprint: dict[str, Any]  # plain JSON values by name
    every_steps: int | None = None
    _last_write: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        text = json.dumps(self.fingerprint, sort_keys=True)
        self.fingerprint = json.loads(text)  # as it will be read: tuples are lists in JSON
        self.path = self.folder / f"{xxhash.xxh3_64(text.encode()).hexdigest()}{SUFFIX}"

    def refuse_leftover(self) -> None:
        """Raise CheckpointError if this training was interrupted and has left one here."""
        if self.path.exists():
            raise CheckpointError(
                f"{self.path} is there, of this very training, which was interrupted: add --resume to go on from it, "
                "or delete it to start anew"
            )

    def refuse_another(self) -> None:
        """Raise CheckpointError if only other trainings have left theirs here, saying in what the newest differs."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda found: found.stat().st_mtime, reverse=True):
            self._check(path, _read(path))

    def is_due(self, step: int, validated: bool) -> bool:
        """Whether to write after this step."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return validated or time.monotonic() - self._last_write >= PERIOD_S

    def write(self, saved: Saved) -> None:
        """Replace what is there, at once and for good."""
        facts = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **saved.facts})
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._partial
        save_file(saved.tensors, partial, {"facts": facts, "digest": _digest(facts, saved.tensors)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.path)
        self._last_write = time.monotonic()

    def read(self) -> Saved | None:
        """What was written last; None if nothing was.

        Raises CheckpointError if it is damaged, or of a training on other data or with another recipe.
        """
        if not self.path.exists():
            return None
        saved = _read(self.path)
        self._check(self.path, saved)
        return saved

    def remove(self) -> None:
        """Delete it, and its folder if nothing else is in there."""
        for path in (self.path, self._partial):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def _check(self, path: Path, saved: Saved) -> None:
        found = saved.facts["fingerprint"]
        for name in {**found, **self.fingerprint}:
            if found.get(name) != self.fingerprint.get(name):
                raise CheckpointError(
                    f"{path} is of another training: {name} is {found.get(name)!r} in it and "
                    f"{self.fingerprint.get(name)!r} now: resume with what it was started with, "
                    "or leave --resume out to start this one anew"
                )


def _read(path: Path) -> Saved:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: what the file maps is not aligned as torch's own memory is, and sums depend on that.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        facts = json.loads(header["facts"])
        whole = header["digest"] == _digest(header["facts"], tensors)
        version = facts["format_version"]
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint ({error}): delete it to start anew") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this code reads {FORMAT_VERSION}: resume with the code that wrote it, "
            "or delete it to start anew"
        )
    if not whole:
        raise CheckpointError(f"{path} is damaged, its digest is another: delete it to start anew")
    return Saved(facts, tensors)


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().reshape(-1).numpy().data)
    return digest.hexdigest()
