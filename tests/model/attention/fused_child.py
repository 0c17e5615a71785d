"""Runs the fused head on cases of a file, in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

    python -m tests.model.attention.fused_child CASES RESULTS DEVICE

Tensors of a case are named case/tensor; test_fused_head.py writes them and judges what comes back.
"""

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention.fused_head import Arithmetic, Tiling, fused_absorbed, fused_absorbed_UKd
from model.attention.scorer import PairScorer
from model.attention.slots import UserSlots

ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "tf32x3", "bfloat16")


def scorer_of(case: dict[str, Tensor]) -> PairScorer:
    scorer = PairScorer(*case["candidate"].shape)
    scorer.load_state_dict({name: case[name] for name in ("candidate", "key", "product", "out")})
    return scorer.to(case["candidate"].device)


def interest(case: dict[str, Tensor]) -> Tensor:
    """[N, d] of candidates [N, d] of ragged users, or of candidates [U, K, d]."""
    slots, scorer = UserSlots(case["keys"], case["values"]), scorer_of(case)
    if case["candidates"].ndim == 3:
        return fused_absorbed_UKd(case["candidates"], slots, scorer).flatten(0, 1)
    options: dict[str, Any] = {"arithmetic": ARITHMETICS[int(case["arithmetic"])]}
    if "tiling" in case:
        options["tiling"] = Tiling(*case["tiling"].tolist())
    return fused_absorbed(case["candidates"], case["offsets"], *slots, scorer, **options)


def main(source: str, target: str, device: str) -> None:
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(source, device=device).items():
        case, _, part = name.rpartition("/")
        cases.setdefault(case, {})[part] = tensor
    save_file({name: interest(case).contiguous() for name, case in cases.items()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
