"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.decoding import advance
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
    xs, dts, Bs, Cs = (v.unbind(1) for v in (x, dt, B, C))
    zs = None if z is None else z.unbind(1)
    for t in reversed(range(l)) if reverse else range(l):
        z_t = None if zs is None else zs[t]
        ys[t], states[owner[t]] = _token(
            xs[t], dts[t], A, Bs[t], Cs[t], D, z_t, dt_bias, states[owner[t]], softplus, low, high
        )
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
    state_indices: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    def token(x, dt, B, C, z, h):
        return _token(x, dt, A, B, C, D, z, dt_bias, h, softplus, low, high)

    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h)
    return advance(token, (x, dt, B, C, z), h, state_indices, x.dim() == 4, dtype)


def _token(
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
) -> tuple[Tensor, Tensor]:
    """y and the state after one token; x, z (b, h, p), dt (b, h), B, C (b, g, n), the state h (b, h, p, n)."""
    dtype = h.dtype
    u, delta = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if softplus:
        delta = F.softplus(delta)
    delta = delta.clamp(low, high)
    B, C = (v.to(dtype).repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))
    decay = (delta * A.to(dtype)).exp()
    h = decay[..., None, None] * h + (delta[..., None] * u)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.to(dtype).view(x.shape[1], -1) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), h
