"""LREA's head and its whole scorer beside DIN over the long history, beside their own products, and beside eager Eq. 9.

DIN over the long history is the function that LREA's rank replaces. It runs in the same kernel, with the history's rows
as slots, so that it is as good as we know how to make it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loadtest.bench.products import replay
from loadtest.bench.timing import Run, medians
from loadtest.bench.world import Shape, World, mlp_products, pair_flops, pair_products
from model.attention.din import DinAttention
from model.attention.interface import Embedded
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.ranker import ScoringInput

Row = dict[str, Any]


def beside_din(shape: Shape, seconds: float) -> Row:
    """Head and whole scorer against DIN over `shape.length` rows: milliseconds, their ratios and those of the flops."""
    world = World(shape)
    serving, scorer, request = world.serving(), world.lrea.scorer, world.request
    history_Ld = world.history(shape.length)
    din_slots = history_Ld, history_Ld * DinAttention(world.config.width, world.config.head_width, shape.length).scale
    _check_din(world, history_Ld, din_slots)
    targets_Bd, out_Bd = world.ranker.embed(request.candidates), torch.empty(shape.candidates, world.config.width)
    din_request = world.with_slots(*din_slots)
    found = medians(
        {
            "head": _attend(scorer, targets_Bd, request.state.keys_Rd, request.state.values_Rd, out_Bd),
            "din_long": _attend(scorer, targets_Bd, *din_slots, out_Bd),
            "scorer": lambda: serving.score(request),
            "din_scorer": lambda: serving.score(din_request),
            "head_products": replay(pair_products(shape.candidates, shape.rank, scorer)),
            "din_products": replay(pair_products(shape.candidates, shape.length, scorer)),
        },
        seconds,
    )
    head, din = (pair_flops(shape.candidates, keys, scorer) for keys in (shape.rank, shape.length))
    rest = pair_flops(shape.candidates, world.config.short_length, scorer) + sum(
        product.flops for product in mlp_products(world, serving)
    )
    return {
        "rank": shape.rank,
        "length": shape.length,
        **{f"{name}_ms": round(value * 1e3, 3) for name, value in found.items()},
        "head_speedup_vs_din_long": round(found["din_long"] / found["head"], 1),
        "head_flops_ratio": round(din / head, 1),
        "scorer_speedup_vs_din_long": round(found["din_scorer"] / found["scorer"], 1),
        "scorer_flops_ratio": round((din + rest) / (head + rest), 1),
        "head_over_matmul": round(found["head"] / found["head_products"], 2),
        "din_long_over_matmul": round(found["din_long"] / found["din_products"], 2),
    }


def beside_its_products(shape: Shape, dtype: torch.dtype, seconds: float) -> Row:
    """The whole scorer beside its matrix products alone in the same dtype, and beside the eager concatenated form."""
    world = World(shape)
    serving, request = world.serving(dtype), world.request
    exact = eager(world, request)
    difference = float((serving.score(request) - exact).abs().max())
    heads = [world.lrea.scorer, world.ranker.short.scorer] if world.ranker.short is not None else [world.lrea.scorer]
    keys = [shape.rank, world.config.short_length]
    products = [
        product
        for scorer, count in zip(heads, keys, strict=False)
        for product in pair_products(shape.candidates, count, scorer, dtype)
    ]
    found = medians(
        {
            "scorer": lambda: serving.score(request),
            "products": replay([*products, *mlp_products(world, serving)]),
            "eager": lambda: eager(world, request),
        },
        seconds,
    )
    return {
        "rank": shape.rank,
        "candidates": shape.candidates,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": round(value * 1e3, 3) for name, value in found.items()},
        "scorer_over_matmul": round(found["scorer"] / found["products"], 2),
        "scorer_speedup_vs_eager": round(found["eager"] / found["scorer"], 2),
        "max_logit_difference": float(f"{difference:.1e}"),
    }


def concatenated(scorer: PairScorer, targets_Bd: Tensor, keys_Nd: Tensor, values_Nd: Tensor) -> Tensor:
    """Eq. 9 as it is printed: [E_t ⊕ E_comp ⊕ E_t ⊙ E_comp] W_in, written out in memory."""
    targets = targets_Bd.unsqueeze(1).expand(-1, len(keys_Nd), -1)
    keys = keys_Nd.expand(len(targets_Bd), -1, -1)
    w_in = torch.cat([scorer.candidate, scorer.key, scorer.product])
    hidden = torch.cat([targets, keys, targets * keys], dim=-1) @ w_in
    return functional.leaky_relu(hidden, NEGATIVE_SLOPE) @ scorer.out @ values_Nd


def eager(world: World, request: ScoringInput) -> Tensor:
    """The ranker in torch's operations, one after the other: Eq. 9 as printed, the rest as `Ranker` has it."""
    ranker, items, window = world.ranker, request.candidates.unsqueeze(), request.short.unsqueeze()
    candidates, short = ranker.embed_all(items), ranker.embed_all(window)
    state = request.state
    long_1Bd = concatenated(world.lrea.scorer, candidates.vectors[0], state.keys_Rd, state.values_Rd).unsqueeze(0)
    assert ranker.short is not None
    inputs = ranker._mlp_input(
        candidates, items.hashes, long_1Bd, state.sketch_M.unsqueeze(0), short, window.hashes,
        torch.cat([request.user_codes, request.context_codes]).unsqueeze(0),
    )  # fmt: skip
    logits: Tensor = ranker.mlp(inputs[0])
    return logits.squeeze(-1)


def _attend(scorer: PairScorer, targets_Bd: Tensor, keys_Nd: Tensor, values_Nd: Tensor, out_Bd: Tensor) -> Run:
    def run() -> Tensor:
        scorer.attend_one(targets_Bd, keys_Nd, values_Nd, out_Bd)
        return out_Bd

    return run


def _check_din(world: World, history_Ld: Tensor, slots: tuple[Tensor, Tensor]) -> None:
    """The contestant is DIN: the attention of model/attention/din.py gives the same for a few candidates."""
    din = DinAttention(world.config.width, world.config.head_width, len(history_Ld))
    din.scorer.load_state_dict(world.lrea.scorer.state_dict())
    targets_Bd = world.ranker.embed(world.items(8))
    wanted = din.scorer(targets_Bd.unsqueeze(0), history_Ld.unsqueeze(0))[0] @ history_Ld * din.scale
    out_Bd = torch.empty_like(targets_Bd)
    world.lrea.scorer.attend_one(targets_Bd, *slots, out_Bd)
    torch.testing.assert_close(out_Bd, wanted, atol=1e-4, rtol=1e-3)
    as_din = din(Embedded.of(targets_Bd.unsqueeze(0)), Embedded.of(history_Ld.unsqueeze(0)))[0]
    torch.testing.assert_close(out_Bd, as_din, atol=1e-4, rtol=1e-3)
