"""Data parallel training: what each of several workers, started by torchrun, does of one training.

Every worker reads the log and draws the same batches. It computes its share of a batch's requests; PyTorch's
DistributedDataParallel averages the gradients, and BatchNorm takes its mean and variance over all shares. So the result
is what one process computes, up to rounding, whatever the number of workers. One worker alone is the plain case.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.log.samples import Requests
from model.ranker import Ranker


@dataclass(frozen=True)
class Workers:
    """This process among `count` that train one model together."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def share(self, batch: Requests) -> tuple[Requests, float]:
        """This worker's requests of a batch, and what the mean loss over their candidates counts for.

        Losses so weighted have the whole batch's gradient as the mean of their gradients.
        """
        if len(batch) < self.count:  # the end of an epoch: too few for a share each, so everyone takes all
            return batch, 1.0
        own = batch.only(np.arange(self.rank, len(batch), self.count))
        return own, len(own.items) * self.count / len(batch.items)

    def wrap(self, ranker: Ranker) -> nn.Module:
        """The ranker as a module whose backward pass averages gradients over the workers; its MLP is changed for it."""
        if self.count == 1:
            return ranker
        for index, layer in enumerate(ranker.mlp):
            if isinstance(layer, nn.BatchNorm1d):
                ranker.mlp[index] = SharedBatchNorm.like(layer)
        return DistributedDataParallel(ranker)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's tensor, in all of them."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def first_says(self, text: str) -> str:
        """The first worker's text, in all of them; each waits for it."""
        said = [text]
        if self.count > 1:
            dist.broadcast_object_list(said)
        return said[0]


ALONE = Workers()


def workers_of(environment: Mapping[str, str]) -> Workers:
    """This process as torchrun's variables say; alone where they say nothing."""
    return Workers(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))


def own_device(device: torch.device, environment: Mapping[str, str]) -> torch.device:
    """This worker's GPU of those on its machine; a CPU is everyone's."""
    if device.type != "cuda" or "LOCAL_RANK" not in environment:
        return device
    return torch.device("cuda", int(environment["LOCAL_RANK"]))


@contextmanager
def joined(workers: Workers, device: torch.device) -> Iterator[None]:
    """The workers of one torchrun can reach each other inside: over NCCL on GPUs, over gloo on CPUs."""
    if workers.count == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # torchrun's variables say where
    try:
        yield
        dist.barrier()  # who leaves first would close connections that others still use
    finally:
        dist.destroy_process_group()


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all workers. PyTorch's SyncBatchNorm is for GPUs only."""

    @classmethod
    def like(cls, layer: nn.BatchNorm1d) -> "SharedBatchNorm":
        """One with the same weights and statistics."""
        shared = cls(layer.num_features, layer.eps, layer.momentum).to(layer.weight.device)
        shared.load_state_dict(layer.state_dict())
        return shared

    def forward(self, rows_Nf: Tensor) -> Tensor:
        """Normalise this worker's rows [N, f] by everyone's mean and variance."""
        if not self.training:
            normalised: Tensor = super().forward(rows_Nf)
            return normalised
        rows = rows_Nf.double()  # a difference of two sums: float32 would lose a small variance
        sums_2f = _SumOverWorkers.apply(torch.stack([rows.sum(0), rows.square().sum(0)]))  # type: ignore[no-untyped-call]
        count = Workers(count=dist.get_world_size()).sum(rows.new_tensor(len(rows)))
        mean_f = sums_2f[0] / count
        variance_f = (sums_2f[1] / count - mean_f.square()).clamp_min(0)
        self._update(mean_f.detach(), variance_f.detach() * count / (count - 1))
        scale_f = self.weight * (variance_f + self.eps).rsqrt()
        normalised = (rows - mean_f) * scale_f + self.bias
        return normalised.to(rows_Nf.dtype)

    @torch.no_grad()
    def _update(self, mean_f: Tensor, variance_f: Tensor) -> None:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean_f.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance_f.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


class _SumOverWorkers(torch.autograd.Function):
    """y = Σ x over the workers, in each of them; so the gradient of x is Σ of that of y."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
