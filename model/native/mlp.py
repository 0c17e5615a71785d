"""The folded MLP on tensors, by the native kernel: all layers of a batch's candidates in one call.

Letters: N candidates of all users, U users, f columns of the first product, h units of the first layer.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor
from torch.nn import functional

from model.native import kernels
from model.native.library import loaded

_ROWS_PER_THREAD = 40  # fewer are not worth another thread: 0.2 ms of the shipped sizes


class Mlp:
    """Hidden layers with a LeakyReLU each and one logit, laid out for the kernel once. float32 on the CPU."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float) -> None:
        """weights: [units, inputs] of each layer, the last one of one unit; biases: of every layer but the first, whose
        come with the candidates. There is one hidden layer at least."""
        *hidden, last = [kernels.floats(weight).contiguous() for weight in weights]
        *hidden_biases, last_bias = [kernels.floats(bias).contiguous() for bias in biases]
        inputs = [weight.shape[1] for weight in (*hidden, last)]
        units = [weight.shape[0] for weight in hidden]
        assert hidden, "an MLP without a hidden layer is one product"
        assert 0 <= slope <= 1, f"a slope of {slope}: a LeakyReLU is taken for the larger of x and slope x"
        assert inputs[1:] == units, "a layer does not take what the one before it gives"
        assert (last.shape, last_bias.shape) == ((1, units[-1]), (1,)), "the last layer gives one logit"
        assert [bias.shape for bias in hidden_biases] == [(count,) for count in units[1:]], "biases of other layers"
        self._panel = int(loaded().lrea_mlp_panel())
        self._panels = [self._in_panels(weight) for weight in hidden]
        self._biases = [self._padded(bias) for bias in hidden_biases]
        self._last, self._last_bias, self._slope = last, float(last_bias), slope
        at = [None, *(bias.data_ptr() for bias in self._biases)]
        self._layers = (_Layer * len(hidden))(
            *(_Layer(panels.data_ptr(), *each) for panels, *each in zip(self._panels, at, inputs, units, strict=False))
        )
        self._inputs, self._units = inputs[0], units[0]
        self._scratch_floats = int(loaded().lrea_mlp_scratch(max(units)))

    def __call__(self, inputs_Nf: Tensor, biases_Uh: Tensor, sizes: Sequence[int]) -> Tensor:
        """Logits [N] of all candidates, the first `sizes[0]` with the first layer's bias `biases_Uh[0]`, and so on.

        Rows of `inputs_Nf` must be contiguous. On as many threads as torch has, where there are enough candidates.
        """
        count = inputs_Nf.shape[0]
        ends = (ctypes.c_int64 * len(sizes))(*accumulate(sizes))
        assert (count, inputs_Nf.shape[1]) == (sum(sizes), self._inputs), f"inputs of shape {tuple(inputs_Nf.shape)}"
        assert biases_Uh.shape == (len(sizes), self._units), f"biases of shape {tuple(biases_Uh.shape)}"
        assert kernels.floats(inputs_Nf).stride(1) == 1 or count == 0, "rows must be contiguous"
        biases_Uh = self._padded(kernels.floats(biases_Uh))
        out_N = inputs_Nf.new_empty(count)

        def some(begin: int, end: int) -> None:
            loaded().lrea_mlp(
                *(kernels.address(inputs_Nf, begin), inputs_Nf.stride(0), begin, end - begin),
                *(biases_Uh.data_ptr(), ends, self._layers, len(self._layers)),
                *(self._last.data_ptr(), self._last_bias, self._slope),
                *(kernels.address(out_N, begin), kernels.scratch(self._scratch_floats)),
            )

        kernels.on_threads(some, count, _ROWS_PER_THREAD)
        return out_N

    def _in_panels(self, weight: Tensor) -> Tensor:
        """[units, inputs] as [panels, inputs, units of a panel], zeros where there are no more units."""
        padded = functional.pad(weight, (0, 0, 0, -len(weight) % self._panel))
        return padded.view(-1, self._panel, weight.shape[1]).transpose(1, 2).contiguous()

    def _padded(self, biases: Tensor) -> Tensor:
        """With zeros up to a whole panel in the last dimension."""
        missing = -biases.shape[-1] % self._panel
        return (functional.pad(biases, (0, missing)) if missing else biases).contiguous()


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "units")),
    )
