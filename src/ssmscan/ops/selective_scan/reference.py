"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor

from ssmscan.ops.decoding import advance
from ssmscan.shapes import state_dtype


def selective_scan(
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
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l = x.shape[:2]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    h = x.new_zeros(batch, *A.shape, dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs, dts, Bs, Cs = (v.unbind(1) for v in (x, dt, B, C))
    zs = None if z is None else z.unbind(1)
    for t in reversed(range(l)) if reverse else range(l):
        z_t = None if zs is None else zs[t]
        ys[t], states[owner[t]] = _token(xs[t], dts[t], A, Bs[t], Cs[t], D, z_t, dt_bias, states[owner[t]], softplus)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def selective_scan_step(
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
) -> Tensor:
    def token(x, dt, B, C, z, h):
        return _token(x, dt, A, B, C, D, z, dt_bias, h, softplus)

    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h)
    return advance(token, (x, dt, B, C, z), h, state_indices, x.dim() == 3, dtype)


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
) -> tuple[Tensor, Tensor]:
    """y and the state after one token; x, dt, z (b, d), B, C (b, g, n), h (b, d, n)."""
    dtype = h.dtype
    per_group = x.shape[1] // max(B.shape[1], 1)
    B, C = (v.to(dtype).repeat_interleave(per_group, 1) for v in (B, C))
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if softplus:
        delta = torch.logaddexp(delta, delta.new_zeros(()))
    delta = delta[..., None]
    h = (delta * A.to(dtype)).exp() * h + delta * B * x.to(dtype)[..., None]
    y = (C * h).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype))
    return y.to(x.dtype), h
