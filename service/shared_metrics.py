"""What several workers count, as one: each writes into memory-mapped files, and whoever is scraped adds them all up.

This is prometheus-client's multiprocess mode with one change: a file belongs to a worker's number, not to its process.
The process that takes the number over goes on with the file, so that no count is lost with a worker, however it
ended, and no file is added by a restart.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it, and only it


class SharedRegistry(CollectorRegistry):
    """Metrics register here as on any registry; what is collected is the sum over all workers."""

    def __init__(self, folder: Path, number: int) -> None:
        """Metrics made from now on in this process count into worker `number`'s files.

        folder: what PROMETHEUS_MULTIPROC_DIR said when the process was started.
        """
        super().__init__()
        values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Every metric that a worker has touched. Of the models shown, those that some worker serves now."""
        for metric in MultiProcessCollector.merge(self._files()):  # type: ignore[no-untyped-call]
            if metric.name == "lrea_model_info":
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric

    def _files(self) -> list[str]:
        """The workers' files, but for one that a worker has only just made and that has no form yet."""
        found = []
        for path in self._folder.glob("*.db"):
            with suppress(FileNotFoundError):  # the gauges of a worker that has ended just now
                if path.stat().st_size:
                    found.append(str(path))
        return found


def forget_gauges(folder: Path, number: int) -> None:
    """Drop what worker `number`, which has ended, was. What it counted stays."""
    mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]
