"""The kernel goes through the compiler for real GPUs, which needs none: the interpreter takes what a GPU would refuse.

A tile's rows must stay in registers: what is spilled goes to memory, which the kernel is there to avoid.
"""

import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from model.attention.fused_head import Arithmetic, choose_tiling, constants_of
from tests.model.attention.fused_child import ARITHMETICS

triton: Any = pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
SIZES = ("total", "rank", "width", "head_width", "tiles", "slots_per_split")
ALIGNED = [["tt.divisibility", 16]]  # as Triton finds pointers of torch and widths of 32 when it is called


def compiled(arithmetic: Arithmetic, width: int, capability: int, slots: str = "*fp32", ones: bool = False) -> Any:
    """The kernel for d = h = width as `fused_absorbed` would launch it for many candidates on that architecture.

    ones: every size is 1, which Triton takes for a constant.
    """
    kernel = import_module("model.attention.fused_kernel").absorbed_kernel
    tiling = choose_tiling(64_000, 64, 1_000, 128, width, arithmetic, processors=132)
    constants = constants_of(arithmetic, tiling, width, width, interpreted=False) | dict.fromkeys(
        SIZES if ones else (), 1
    )
    types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    types |= {"offsets_U1": "*i32", "keys_URd": slots, "values_URd": slots}
    types |= {} if ones else dict.fromkeys(SIZES, "i32")
    aligned = [name for name in types if (types[name] == "i32" and "width" in name) or types[name][0] == "*"]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): ALIGNED for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": tiling.warps})


def spilled_bytes(cubin: Path) -> int:
    """Bytes of memory per thread for what did not fit in registers, as the assembler recorded them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_tiles_of_the_default_width_stay_in_registers(
    arithmetic: Arithmetic, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(arithmetic, 32, capability)
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    assert spilled_bytes(tmp_path / "kernel.cubin") == 0
    assert kernel.metadata.shared <= 48 * 1024  # what every GPU gives a program
    uses_tensor_cores = re.search(r"mma\.sync|wgmma\.mma_async", kernel.asm["ptx"]) is not None
    assert uses_tensor_cores == (arithmetic != "float32")


def test_the_widest_head_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert compiled("float32", 128, 80).metadata.shared <= 99 * 1024  # of the smallest GPU of compute capability 8


def test_stored_float16_and_sizes_of_one_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert "ld.global.b16" in compiled("bfloat16", 32, 80, slots="*fp16").asm["ptx"]
    assert compiled("float32", 1, 80, ones=True).asm["cubin"]
