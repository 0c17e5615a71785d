"""The ranker's MLP, and its BatchNorm folded into the products for serving."""

import itertools

import torch
from torch import nn

from model.attention.scorer import NEGATIVE_SLOPE


def training_mlp(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """BatchNorm of the input, then Linear, BatchNorm and LeakyReLU per hidden layer, then one logit."""
    layers: list[nn.Module] = [nn.BatchNorm1d(inputs)]
    for before, after in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(NEGATIVE_SLOPE)]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], 1))


def serving_mlp(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """The same function without BatchNorm: Linear and LeakyReLU per hidden layer, then one logit."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), nn.LeakyReLU(NEGATIVE_SLOPE)]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], 1))


@torch.no_grad()
def fold_batch_norm(trained: nn.Sequential, serving: nn.Sequential) -> None:
    """Fill `serving` with `trained` in evaluation mode; exact up to float32 rounding (folded in float64)."""
    products = [index for index, layer in enumerate(trained) if isinstance(layer, nn.Linear)]
    targets = [layer for layer in serving if isinstance(layer, nn.Linear)]
    in_scale, in_shift = _affine(trained[0])
    for index, target in zip(products, targets, strict=True):
        layer = trained[index]
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.double(), layer.bias.double()
        if index == products[0]:
            weight, bias = weight * in_scale, bias + weight @ in_shift
        if index != products[-1]:
            scale, shift = _affine(trained[index + 1])
            weight, bias = weight * scale.unsqueeze(1), bias * scale + shift
        target.weight.copy_(weight)
        target.bias.copy_(bias)


def _affine(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a BatchNorm in evaluation mode, float64."""
    assert isinstance(layer, nn.BatchNorm1d)
    assert layer.running_var is not None
    assert layer.running_mean is not None
    scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    return scale, layer.bias.double() - layer.running_mean.double() * scale
