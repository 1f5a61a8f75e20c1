"""The norm in plain PyTorch, differentiable any number of times, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options
from ssmscan.shapes import state_dtype


def gated_rms_norm(inputs: Inputs, options: Options) -> Tensor:
    x, weight, z = inputs
    eps, size, norm_before_gate, _ = options
    if x.numel() == 0:
        return (x * 1).to(options.dtype)
    dtype = state_dtype(x, weight, z)
    u = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        u = u * gate
    groups = u.unflatten(-1, (-1, size))
    u = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        u = u * gate
    return u.to(options.dtype)
