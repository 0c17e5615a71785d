"""One run of a comparison: train, judge by both protocols, keep the logits, delete the bundle."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.bundle import Bundle, load_bundle
from model.comparison.ledger import Finished, save_logits
from model.comparison.plan import Run
from model.comparison.storage import bytes_per_user
from model.evaluation.evaluate import EvaluationConfig, Judge, Judgement
from model.log.behaviours import InteractionLog
from model.training.train import train


@dataclass(frozen=True)
class Bench:
    """What every run in one process shares."""

    log: InteractionLog
    folder: Path
    evaluation: EvaluationConfig
    device: torch.device
    keep_bundles: bool = False

    def perform(self, run: Run) -> Finished:
        """Train and judge; the logits are on disk when it returns. Raises what training and evaluation raise."""
        with self._bundles(run) as bundles:
            trained = train(self.log, bundles, run.recipe, self.evaluation.as_of, self.device, lambda *_: None)
            bundle = load_bundle(trained.path, self.device)
            started = time.monotonic()
            judge = Judge(bundle, self.log, self.evaluation)
            fresh, as_of = judge.judge("fresh"), judge.judge("as-of")
            logits = {"fresh": fresh.logits, "as_of": as_of.logits}
            if bundle.config.form == "paper":  # which it serves otherwise than it was trained
                logits["trained"] = judge.judge("fresh", as_trained=True).logits
            seconds = time.monotonic() - started
        save_logits(self.folder, run.key, logits)
        return Finished(
            key=run.key,
            name=run.name,
            model=asdict(bundle.config),
            training=asdict(run.training),
            evaluation=asdict(self.evaluation),
            data=bundle.metadata["data"],
            validation=dict(trained.metrics),
            test=_test_metrics(fresh, as_of),
            absorption_gap=bundle.metadata["absorption_gap"],
            parameters=_count(bundle),
            parameters_without_embeddings=_count(bundle) - _count_embeddings(bundle),
            bytes_per_user=bytes_per_user(bundle.config, bundle.record_shape),
            samples=trained.samples,
            seconds=trained.seconds,
            samples_per_second=trained.samples_per_second,
            evaluation_seconds=seconds,
            device=self.device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    @contextmanager
    def _bundles(self, run: Run) -> Iterator[Path]:
        """A folder for the run's bundle, kept under bundles/ only if asked for, and then only of a finished run."""
        partial, kept = _unfinished(self.folder) / run.key, self.folder / "bundles"
        partial.mkdir(parents=True)
        try:
            yield partial
            if self.keep_bundles:
                kept.mkdir(exist_ok=True)
                for bundle in partial.iterdir():
                    shutil.rmtree(kept / bundle.name, ignore_errors=True)
                    bundle.rename(kept / bundle.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def unfinished_removed(folder: Path) -> Iterator[None]:
    """What runs leave when they are killed is gone before others begin, and when they end."""
    shutil.rmtree(_unfinished(folder), ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(_unfinished(folder), ignore_errors=True)


def _unfinished(folder: Path) -> Path:
    return folder / ".partial"


def _test_metrics(fresh: Judgement, as_of: Judgement) -> dict[str, float | None]:
    frozen = {f"{name}_as_of": value for name, value in as_of.metrics().items()}
    return {**fresh.metrics(), **frozen}


def _count(bundle: Bundle) -> int:
    return sum(parameter.numel() for parameter in bundle.ranker.parameters())


def _count_embeddings(bundle: Bundle) -> int:
    ranker = bundle.ranker
    tables = (ranker.item_embedding, *ranker.feature_embeddings, *ranker.side_embeddings)
    return sum(parameter.numel() for table in tables for parameter in table.parameters())
