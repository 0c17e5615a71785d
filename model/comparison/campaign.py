"""Runs brought to their end: those that the ledger has are skipped, the others performed, kept and told of."""

import time
from collections.abc import Iterable, Sequence
from contextlib import closing

from model.comparison.ledger import Finished, Ledger
from model.comparison.plan import Run
from model.comparison.workers import Failure, Workers
from model.progress import Reporter


class Campaign:
    """What was run and what failed, over all phases of a comparison."""

    def __init__(self, ledger: Ledger, workers: Workers, reporter: Reporter) -> None:
        self._ledger, self._workers, self._reporter = ledger, workers, reporter
        self.failures: dict[str, Failure] = {}  # by key; not tried again by this campaign

    def finish(self, phase: str, runs: Sequence[Run]) -> None:
        """Perform the runs that are neither finished nor failed."""
        distinct: dict[str, Run] = {}
        for run in runs:
            distinct.setdefault(run.key, run)  # of equal runs the first gives its name
        open_runs = [run for key, run in distinct.items() if self._ledger.get(key) is None and key not in self.failures]
        self._reporter.start(phase, len(distinct), "runs")
        self._reporter.advance(len(distinct) - len(open_runs))
        started = time.monotonic()
        with closing(self._workers.perform(open_runs)) as outcomes:
            for done, outcome in enumerate(outcomes, start=1):
                said = self._fail(outcome) if isinstance(outcome, Failure) else self._keep(outcome)
                self._reporter.note(f"{said}{_remaining(time.monotonic() - started, done, len(open_runs))}")
                self._reporter.advance(1)

    def accept_divergence(self, runs: Iterable[Run]) -> None:
        """A learning rate that diverges is an answer, not a failure, where another of the same model does not."""
        for run in runs:
            if run.key in self.failures and self.failures[run.key].diverged:
                del self.failures[run.key]

    def get(self, run: Run) -> Finished | None:
        """The finished run, if it is finished."""
        return self._ledger.get(run.key)

    def _keep(self, finished: Finished) -> str:
        self._ledger.append(finished)
        training, seconds = finished.training, finished.seconds + finished.evaluation_seconds
        which = f"{finished.name}, seed {training['seed']}, learning rate {training['learning_rate']:g}"
        found = finished.test["auc"]
        return f"{which}: AUC {'–' if found is None else f'{found:.4f}'} in {seconds:.0f} s"

    def _fail(self, failure: Failure) -> str:
        self.failures[failure.run.key] = failure
        return f"{failure.trace}{failure.run} failed: {failure.message}"


def _remaining(seconds: float, done: int, count: int) -> str:
    """How long the rest will take if it goes on as it went."""
    if done == count:
        return ""
    return f"; {count - done} runs left, about {seconds / done * (count - done) / 60:.0f} min"
