"""The norm group by group, as a plain loop. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor

from ssmscan.shapes import state_dtype


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, size: int, norm_before_gate: bool, y_dtype: torch.dtype
) -> Tensor:
    dtype = state_dtype(x, weight, z)
    ys = []
    for start in range(0, x.shape[-1], max(size, 1)):
        group = slice(start, start + size)
        u = x[..., group].to(dtype)
        gate = torch.ones((), dtype=dtype, device=x.device)
        if z is not None:
            v = z[..., group].to(dtype)
            gate = v * torch.sigmoid(v)
        if not norm_before_gate:
            u = u * gate
        u = u / torch.sqrt((u * u).mean(-1, keepdim=True) + eps) * weight[group].to(dtype)
        if norm_before_gate:
            u = u * gate
        ys.append(u.to(y_dtype))
    return torch.cat(ys, -1) if ys else (x * 1).to(y_dtype)
