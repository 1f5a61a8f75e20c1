"""The scan in plain PyTorch, differentiable any number of times, on any device."""

from torch import Tensor

from ssmscan.ops.matrix_scan.autograd import Inputs, Options
from ssmscan.ops.recurrence import recurrence
from ssmscan.shapes import state_dtype


def matrix_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, log_a, h0, sequence = inputs
    reverse = options.reverse
    batch, _, r, c = x.shape
    dtype = state_dtype(x, log_a, h0)
    h = x.new_zeros(batch, r, c, dtype=dtype) if h0 is None else h0.to(dtype)
    a = log_a.to(dtype).exp()[..., None]
    hs, final = recurrence(a, x.to(dtype), h, sequence, reverse)
    return hs.to(x.dtype), final
