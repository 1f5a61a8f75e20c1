"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.shapes import state_dtype


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, heads, p = x.shape
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    h = x.new_zeros(batch, heads, p, B.shape[3], dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs, dts, Bs, Cs = (v.to(dtype).unbind(1) for v in (x, dt, B, C))
    zs = None if z is None else z.to(dtype).unbind(1)
    for t in reversed(range(l)) if reverse else range(l):
        z_t = None if zs is None else zs[t]
        y, h = _advance(xs[t], dts[t], Bs[t], Cs[t], z_t, A, D, dt_bias, states[owner[t]], softplus, low, high)
        states[owner[t]] = h
        ys[t] = y.to(x.dtype)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    x_, dt, B, C = (v.to(h.dtype) for v in (x, dt, B, C))
    z = None if z is None else z.to(h.dtype)
    y, after = _advance(x_, dt, B, C, z, A, D, dt_bias, h, softplus, low, high)
    h.copy_(after)
    return y.to(x.dtype)


def _advance(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """One token: x, z (b, h, p), dt (b, h), B, C (b, g, n), the state h (b, h, p, n)."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(h.dtype)
    if softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(low, high)
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))
    decay = (dt * A.to(h.dtype)).exp()
    h = decay[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.to(h.dtype).view(x.shape[1], -1) * x
    return y if z is None else y * F.silu(z), h
