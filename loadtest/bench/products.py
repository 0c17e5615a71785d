"""The matrix products that something is made of, recorded as it runs or written down, and run again alone.

How close a contestant comes to its own products says whether it was made slow, on purpose or not.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loadtest.bench.timing import Run

# Of one product at a time: the result stays in a core's cache, as a caller who cares would have it.
_ROWS, _COLUMNS = 128, 4096
_ATEN = torch.ops.aten
# Where the two factors stand among the arguments.
_FACTORS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
}


class Product(NamedTuple):
    """[rows, inner] times [inner, columns], so many at once."""

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype = torch.float32
    batch: int = 1

    @property
    def flops(self) -> int:
        """One multiplication and one addition per element of the inner axis."""
        return 2 * self.batch * self.rows * self.inner * self.columns


def record(run: Run) -> list[Product]:
    """The products of torch's that `run` calls; those inside a native kernel are not seen."""
    mode = _Recorder()
    with mode:
        run()
    return mode.found


def replay(products: Iterable[Product]) -> Run:
    """A run of these products and nothing else, on random tensors, in pieces that stay in cache.

    Many at once stay so: one by one, a candidate's own 50 rows take longer to be called than to be computed.
    """
    pieces = [piece for product in products for piece in _pieces(product)]

    def run() -> Tensor:
        for left, right, out in pieces:
            (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=out)
        return out

    return run


def _pieces(product: Product) -> list[tuple[Tensor, Tensor, Tensor]]:
    if product.batch > 1:
        left, right = (
            torch.randn(product.batch, *shape).to(product.dtype)
            for shape in ((product.rows, product.inner), (product.inner, product.columns))
        )
        return [(left, right, torch.empty(product.batch, product.rows, product.columns, dtype=product.dtype))]
    right = torch.randn(product.inner, min(_COLUMNS, product.columns)).to(product.dtype)
    left = torch.randn(product.rows, product.inner).to(product.dtype)
    # A narrow result is small whatever its rows are, and is best made at once.
    rows = _ROWS if product.columns > product.inner * 8 else max(_ROWS, 1 << 18 >> product.columns.bit_length())
    out = torch.empty(rows, right.shape[1], dtype=product.dtype)
    pieces = []
    for begin in range(0, product.columns, _COLUMNS):
        columns = min(_COLUMNS, product.columns - begin)
        for part in left.split(rows):  # type: ignore[no-untyped-call]
            pieces.append((part, right[:, :columns], out[: len(part), :columns]))
    return pieces


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Product] = []

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _FACTORS:
            left, right = (args[place] for place in _FACTORS[function])
            batch = left.shape[0] if left.ndim == 3 else 1
            rows, inner = left.shape[-2:]
            self.found.append(Product(rows, inner, right.shape[-1], left.dtype, batch))
        return function(*args, **(kwargs or {}))
