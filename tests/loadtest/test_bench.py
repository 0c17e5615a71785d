"""The bench measures what it says: contestants that agree, products that are theirs, and every figure of its line."""

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import torch

from loadtest.bench import __main__ as bench
from loadtest.bench import report
from loadtest.bench.products import Product, record, replay
from loadtest.bench.scorers import concatenated, eager
from loadtest.bench.timing import LEAST_TURNS, medians
from loadtest.bench.world import Shape, World, mlp_products, pair_flops, pair_products
from model.attention.scorer import PairScorer

KEYS = {
    "head_speedup_vs_din_long", "head_flops_ratio", "scorer_speedup_vs_din_long", "scorer_flops_ratio",
    "din_long_over_matmul", "flat_in_length", "scorer_over_matmul", "scorer_speedup_vs_eager",
    "scorer_speedup_vs_eager_ordinary_process",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def test_every_table_and_the_line_of_figures(tmp_path: Path) -> None:
    tables = {bench.ORDINARY: [bench.in_an_ordinary_process(20, 8, 0.0)]}
    tables |= bench.measure(20, 8, 0.0, lengths=(130, 240))
    summary = bench.summarise(tables, 20, 8)
    assert summary.keys() >= KEYS
    assert all(summary[key] > 0 for key in KEYS)
    assert summary["head_flops_ratio"] == 30  # L / r, and nothing else differs
    rows = tables["Every method, by length of history"]
    assert {row["length"] for row in rows} == {130, 240}
    assert summary["methods_over_matmul"].keys() == {row["method"] for row in rows}
    results, page, *plot = report.write(tmp_path, summary, tables)
    assert orjson.loads(results.read_bytes())["summary"] == summary
    text = page.read_text()
    assert all(title in text for title in tables)
    assert "| twin | 240 |" in text
    assert [path.suffix for path in plot] == [".png"]


def test_the_eager_form_is_the_scorer(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(Shape(candidates=50, rank=7))
    torch.testing.assert_close(eager(world, world.request), world.serving().score(world.request), atol=1e-5, rtol=1e-4)


def test_the_concatenated_head_is_the_head() -> None:
    torch.manual_seed(0)
    scorer, targets, keys, values = PairScorer(8, 6), torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 8)
    wanted = scorer.attend(targets.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))[0]
    torch.testing.assert_close(concatenated(scorer, targets, keys, values), wanted, atol=1e-6, rtol=1e-5)


def test_products_are_recorded_with_their_shapes_and_run_again() -> None:
    left, right, batch = torch.randn(3, 4), torch.randn(4, 5), torch.randn(2, 3, 4)

    def run() -> torch.Tensor:
        left @ right
        return torch.baddbmm(torch.zeros(2, 3, 5), batch, right.expand(2, -1, -1))

    assert record(run) == [Product(3, 4, 5), Product(3, 4, 5, batch=2)]
    assert Product(3, 4, 5, batch=2).flops == 2 * Product(3, 4, 5).flops == 240
    assert replay([Product(300, 16, 9000), Product(2, 3, 4, torch.bfloat16)])().dtype == torch.bfloat16
    assert replay(record(run))().shape == (2, 3, 5)


def test_flops_of_the_whole_scorer_are_those_of_its_products() -> None:
    world = World(Shape(candidates=10, rank=4))
    serving = world.serving(torch.bfloat16)  # in which the MLP is torch's, so that its products are seen
    scorer = world.lrea.scorer
    assert sum(product.flops for product in pair_products(10, 4, scorer)) == 10 * 4 * (2 * 32 * 32 + 2 * 32)
    assert pair_flops(10, 4, scorer) == 10 * 4 * (2 * 32 * 32 + 4 * 32 + 2 * 32)
    recorded = [product for product in record(lambda: serving.score(world.request)) if product.rows == 10]
    assert recorded == mlp_products(world, serving)


def test_medians_take_turns() -> None:
    order: list[str] = []

    def run_of(name: str) -> torch.Tensor:
        order.append(name)
        return torch.zeros(1)

    found = medians({"a": lambda: run_of("a"), "b": lambda: run_of("b")}, 0.0)
    assert order == ["a", "a", "b", "b"] * LEAST_TURNS, "each timed one after one that is not"
    assert found.keys() == {"a", "b"}


def test_the_documented_keys_are_those_of_the_line() -> None:
    text = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text()
    assert [key for key in (*KEYS, "methods_over_matmul", "native_kernels") if f"`{key}`" not in text] == []
