"""The scan in plain PyTorch, differentiable any number of times, on any device."""

from torch import Tensor

from ssmscan.ops.linear_scan.autograd import Inputs, Options
from ssmscan.ops.recurrence import recurrence
from ssmscan.shapes import state_dtype


def linear_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, decay, b, c, h0, sequence = inputs
    log, reverse = options
    batch, _, d = x.shape
    dtype = state_dtype(x, decay, b, c, h0)
    h = x.new_zeros(batch, d, dtype=dtype) if h0 is None else h0.to(dtype)
    a = decay.to(dtype).exp() if log else decay.to(dtype)
    u = x.to(dtype) if b is None else b.to(dtype) * x.to(dtype)
    hs, final = recurrence(a, u, h, sequence, reverse)
    return (hs if c is None else c.to(dtype) * hs).to(x.dtype), final
