"""Several workers compute what one computes: in parts here, and as two processes that torchrun starts."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.bundle import load_bundle
from model.log.behaviours import read_log
from model.log.samples import Requests
from model.methods import METHODS, method_options
from model.recipe import Recipe
from model.training.distributed import ALONE, SharedBatchNorm, Workers, joined, own_device, workers_of
from model.training.fit import Fitting, make_optimizer
from model.training.material import prepare_material
from model.training.split import batches_from
from model.training.train import train
from model.training.trials import starting_ranker
from tests.tiny import AS_OF, MODEL, TRAINING

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
OPTIONS = dataclasses.replace(TRAINING, max_positives=1200)


def requests(*counts: int) -> Requests:
    """One request per count of candidates."""
    offsets, items = np.cumsum([0, *counts]), np.arange(sum(counts), dtype=np.int32)
    each = np.arange(len(counts))
    return Requests(each, each, each, offsets, items, (items % 2).astype(np.int8))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_losses_weighted_as_they_are_shared_average_to_the_whole_batch_s(count: int) -> None:
    batch = requests(3, 1, 7, 2, 1)
    loss_of_item = np.random.default_rng(0).random(len(batch.items))
    shares = [Workers(rank, count).share(batch) for rank in range(count)]
    weighted = [loss_of_item[own.items].mean() * weight for own, weight in shares]
    assert np.mean(weighted) == pytest.approx(loss_of_item.mean())
    if count <= len(batch):  # with fewer requests than workers each takes all of them
        assert sorted(item for own, _ in shares for item in own.items) == list(range(len(batch.items)))


def test_torchrun_s_variables_say_who_a_process_is() -> None:
    assert workers_of({}) == ALONE
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert workers_of(environment) == Workers(3, 4)
    assert own_device(CPU, environment) == CPU
    assert own_device(torch.device("cuda"), environment) == torch.device("cuda", 1)
    assert own_device(torch.device("cuda"), {}) == torch.device("cuda")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_shared_batch_norm_of_one_worker_is_batch_norm() -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(5)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    shared = SharedBatchNorm.like(plain)
    weight = torch.randn(5)
    for _ in range(3):
        rows = torch.randn(20, 5) * torch.tensor([1.0, 1e-3, 1e3, 1.0, 0.0]) + torch.tensor([0.0, 10, 0, -5, 1])
        gradients, outputs = [], []
        for layer in (plain, shared):
            layer.zero_grad()
            inputs = rows.clone().requires_grad_()
            outputs.append(layer(inputs))
            (outputs[-1].tanh() * weight).sum().backward()
            gradients.append([inputs.grad, layer.weight.grad, layer.bias.grad])
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(shared.state_dict(), plain.state_dict(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.eval()(rows), plain.eval()(rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_of_every_method_has_a_gradient_in_every_step(data: Path, method: str) -> None:
    """DistributedDataParallel waits for each of them."""
    recipe = Recipe({**MODEL, **method_options(method)}, OPTIONS)
    material = prepare_material(read_log(data), recipe, AS_OF, CPU)
    ranker, _ = starting_ranker(material, OPTIONS, None)
    fitting = Fitting(material.source, material.split, OPTIONS)
    fitting._learn(ranker, ranker, make_optimizer(ranker, OPTIONS), next(batches_from(material.split, OPTIONS, 0)))
    assert [name for name, weight in ranker.named_parameters() if weight.grad is None] == []


@pytest.mark.slow
@pytest.mark.timeout(240)  # three processes that each import torch
def test_two_processes_train_the_model_that_one_trains(tmp_path: Path, data: Path) -> None:
    recipe, out = Recipe(MODEL, OPTIONS), tmp_path / "out"
    one = train(read_log(data), tmp_path / "one", recipe, AS_OF, CPU, lambda *_: None)
    config = tmp_path / "recipe.toml"
    tables = {"model": {**MODEL, "mlp": [16, 8]}, "training": dataclasses.asdict(OPTIONS)}
    text = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in tables[name].items())
        for name in tables
    ]
    config.write_text("".join(text))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "model", "train",
        "--data", str(data), "--out", str(out), "--as-of", str(AS_OF), "--config", str(config), "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    both = json.loads(line)
    assert [path.name for path in out.iterdir()] == [both["model_id"]]
    assert both["samples"] == one.samples
    assert both["metrics"] == pytest.approx(one.metrics, abs=2e-3)
    # Not the same bit by bit, for sums are in another order; but far nearer than another training would be.
    bundles = load_bundle(out / both["model_id"]), load_bundle(one.path)
    assert bundles[0].metadata["workers"] == 2
    embeddings = [bundle.ranker.item_embedding.weight for bundle in bundles]
    assert float((embeddings[0] - embeddings[1]).abs().mean()) < 0.01 * float(embeddings[1].abs().mean())


def test_alone_there_is_nothing_to_join() -> None:
    with joined(ALONE, CPU):
        assert not dist.is_initialized()
    assert ALONE.first_says("this") == "this"
