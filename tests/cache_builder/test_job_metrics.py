"""The textfile says what the build's last line says, and of a build that failed that it did."""

import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cache_builder.gate import Measured
from cache_builder.job_metrics import GAUGES, write_metrics
from cache_builder.options import Summary

SUMMARY = Summary(
    "3f2a00c0ffee", "gen-a", True, 3, None, "float16", 30, 7, 3000, 5, 9000, 300.0, 2.5, 12.0, Measured(0.1, 0.9)
)


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    assert [name for name in GAUGES if f"`{name}`" not in text] == []


def read(path: Path) -> dict[str, float]:
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert all(sample.labels == {"key_prefix": "lrea"} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_a_build_that_published(tmp_path: Path) -> None:
    write_metrics(tmp_path / "lrea.prom", "lrea", SUMMARY)
    found = read(tmp_path / "lrea.prom")
    assert abs(found.pop("lrea_build_ended_timestamp_seconds") - time.time()) < 60
    assert found == {
        "lrea_build_succeeded": 1, "lrea_build_seconds": 2.5, "lrea_build_users": 30, "lrea_build_copied_users": 7,
        "lrea_build_rows": 3000, "lrea_build_bad_rows": 5, "lrea_build_record_bytes": 9000,
        "lrea_build_unknown_items": 0.1,
        "lrea_build_coverage": 0.9,
    }  # fmt: skip
    assert found.keys() < GAUGES.keys()


def test_a_build_that_failed_leaves_no_figures_of_the_one_before(tmp_path: Path) -> None:
    write_metrics(tmp_path / "lrea.prom", "lrea", SUMMARY)
    write_metrics(tmp_path / "lrea.prom", "lrea", None)
    assert read(tmp_path / "lrea.prom")["lrea_build_succeeded"] == 0
    assert read(tmp_path / "lrea.prom").keys() == {"lrea_build_succeeded", "lrea_build_ended_timestamp_seconds"}
