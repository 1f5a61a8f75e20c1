"""The scan in plain PyTorch, differentiable any number of times, on any device.

The states are one linear recurrence for each channel and state; this path alone stores all of them, (b, l, d, n).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.recurrence import recurrence
from ssmscan.ops.selective_scan.autograd import Inputs, Options
from ssmscan.shapes import state_dtype


def selective_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, reverse = options
    batch, l, d = x.shape
    g, n = B.shape[2:]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    v = x.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if softplus:
        delta = torch.logaddexp(delta, delta.new_zeros(()))
    groups = (batch, l, g, d // max(g, 1))
    u = (delta * v).view(groups)[..., None] * B.to(dtype)[:, :, :, None]
    a = (delta[..., None] * A.to(dtype)).exp()
    h = v.new_zeros(batch, d, n) if h0 is None else h0.to(dtype)
    hs, h = recurrence(a, u.reshape(batch, l, d, n), h, sequence, reverse)
    y = (hs.view(*groups, n) * C.to(dtype)[:, :, :, None]).sum(-1).view(batch, l, d)
    if D is not None:
        y = y + D.to(dtype) * v
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), h
