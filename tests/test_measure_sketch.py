"""What the measurement of the match sketch says, against the sketch itself and against counts made by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.log.behaviours import read_log
from model.match_sketch import build_sketch, read_sketch
from scripts.measure_sketch import LAYOUTS, Column, Figures, Measurement, Reading, Rows, averaged, main
from tests.tiny import AS_OF, tiny_data

M = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's data folder."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def column() -> Column:
    """120 items, all with a value but item 0, which is padding."""
    hashes = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 121)
    hashes[0] = 0
    return Column("item", hashes, np.arange(121), 121)


def rows_of(long_nL: np.ndarray, asked_nK: np.ndarray) -> Rows:
    request, age = np.nonzero(long_nL)
    asked_of = np.repeat(np.arange(len(asked_nK)), asked_nK.shape[1])
    return Rows(request, long_nL[request, age], age, asked_of, asked_nK.ravel())


def test_two_tables_answer_as_the_model_s_sketch_does(column: Column) -> None:
    rng = np.random.default_rng(2)
    long_nL, asked_nK = rng.integers(0, 90, (3, 200)), rng.integers(1, 121, (3, 40))
    found = rows_of(long_nL, asked_nK).look_up(LAYOUTS["two tables"].cells_of(column.hashes, M), 2 * M).in_steps()
    long_UNC, asked_UKC = (torch.from_numpy(column.hashes[items])[..., None] for items in (long_nL, asked_nK))
    expected = read_sketch(build_sketch(long_UNC, (M,)), asked_UKC, (M,)).flatten(0, 1).numpy()
    assert 0 < expected[:, 1].mean() < 1
    np.testing.assert_array_equal(found.seen, expected[:, 1])
    np.testing.assert_allclose(found.log_counts(), expected[:, 0], rtol=1e-6)
    codes = 2.0 ** (-found.age_codes() / 2)
    np.testing.assert_allclose(np.where(found.seen, codes, 0), expected[:, 2], rtol=1e-6)


def test_a_cell_for_every_value_counts_exactly(column: Column) -> None:
    rows = rows_of(np.array([[5, 7, 5, 0, 9], [9, 0, 0, 0, 9]]), np.array([[5, 9, 1], [9, 5, 7]]))
    found = rows.look_up(column.values[:, None], column.distinct)
    assert found.counts.tolist() == [2, 1, 0, 2, 0, 0]
    assert found.ages[found.seen].tolist() == [0, 4, 0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_errs_as_often_as_its_formula_says(name: str) -> None:
    rng = np.random.default_rng(3)
    hashes = rng.integers(-(2**63), 2**63 - 1, 4000)
    layout, distinct = LAYOUTS[name], 100
    rows = rows_of(np.arange(1, 1 + distinct)[None], np.arange(1 + distinct, 4000)[None])
    # One history leaves the share of filled cells to chance: 30 hash functions, as all the bits are random.
    shares = []
    for turn in range(30):
        cells = layout.cells_of(hashes * (2 * turn + 1) ^ (hashes >> 13), M)
        assert int(cells.max()) < 2 * M
        shares.append(rows.look_up(cells, 2 * M).seen.mean())
    assert np.mean(shares) == pytest.approx(layout.expected(np.array(distinct), M), abs=0.02)


def test_readings_in_steps_are_the_lower_ends_of_the_codes() -> None:
    found = Reading(np.array([0, 1, 5, 23, 1000]), np.array([0, 1, 2, 6, 70_000])).in_steps()
    assert found.counts.tolist() == [0, 1, 4, 16, 192]
    assert found.ages.tolist() == [0, 1, 1, 3, 32_767]


def test_figures_of_tables_that_hold_every_value_apart_are_exact(data: Path) -> None:
    measurement = Measurement(read_log(data), AS_OF, 7)
    for one in measurement.figures(24, [2**16], lengthened=False):
        assert one.rows <= 24
        assert one.false_seen == pytest.approx(0, abs=2e-3)
        assert one.wrong_age == pytest.approx(0, abs=2e-3)
        assert one.auc_count == pytest.approx(one.auc_count_exact, abs=2e-3)
        assert 0.3 < one.auc_recency_exact < 1


def test_lengthened_histories_have_all_their_rows_and_begin_with_the_user_s(data: Path) -> None:
    measurement = Measurement(read_log(data), AS_OF, 7)
    requests = measurement._requests
    real, lengthened = (measurement._long_rows(requests, 400, asked) for asked in (False, True))
    assert (lengthened > 0).all()
    assert not (real > 0).all()
    np.testing.assert_array_equal(lengthened[real > 0], real[real > 0])
    assert {one.rows for one in measurement.figures(400, [64], lengthened=True)} == {400}


def test_seeds_are_averaged() -> None:
    one = Figures("item", 9, False, 1.0, 2.0, "shared", 4, 8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    other = Figures("item", 9, False, 1.0, 4.0, "shared", 4, 8, 0.3, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    (mean,) = averaged([[one], [other]])
    assert (mean.distinct, mean.cells, mean.layout) == (3.0, 4, "shared")
    assert mean.false_seen == pytest.approx(0.2)


def test_the_last_line_is_json_and_the_table_says_the_same(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(data), "--as-of", str(AS_OF), "--seeds", "2"]
    assert main([*arguments, "--lengths", "24", "--lengthened", "100", "--cells", "32,64"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)["figures"]
    assert len(figures) == 2 * 2 * 2 * len(LAYOUTS)  # histories, columns, sizes
    assert len(table) == 2 + len(figures) / len(LAYOUTS)
    assert all(math.isfinite(one["auc_count"]) for one in figures)
    shown = [row.split(" | ") for row in table[2:]]
    two_tables = [one for one in figures if one["layout"] == "two tables"]
    assert [row[5] for row in shown] == [
        f"{one['false_seen'] if one['false_seen'] is not None else math.nan:.4f}" for one in two_tables
    ]
    assert [row[0] for row in shown] == ["| 24"] * 4 + ["| 100 lengthened"] * 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--cells", "100", "wanted a power of two"), ("--as-of", "10000", "nothing to learn or judge by")],
)
def test_what_cannot_be_measured_is_said(
    data: Path, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(data), "--as-of", str(AS_OF), option, value]) == 1
    assert message in capsys.readouterr().err
