"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

from functools import partial

import torch
from torch import Tensor

from ssmscan.ops.decoding import advance
from ssmscan.shapes import state_dtype


def linear_scan(
    x: Tensor,
    decay: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    log: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    dtype = state_dtype(x, decay, b, c, h0)
    h = x.new_zeros(batch, d, dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs, decays = (v.unbind(1) for v in (x, decay))
    bs, cs = ([None] * l if v is None else v.unbind(1) for v in (b, c))
    for t in reversed(range(l)) if reverse else range(l):
        ys[t], states[owner[t]] = _token(xs[t], decays[t], bs[t], cs[t], states[owner[t]], log)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def linear_scan_step(
    x: Tensor, decay: Tensor, b: Tensor | None, c: Tensor | None, h: Tensor, state_indices: Tensor | None, log: bool
) -> Tensor:
    token, dtype = partial(_token, log=log), state_dtype(x, decay, b, c, h)
    return advance(token, (x, decay, b, c), h, state_indices, x.dim() == 3, dtype)


def _token(x: Tensor, decay: Tensor, b: Tensor | None, c: Tensor | None, h: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    """The output of one token and the state after it; all (b, d)."""
    dtype = h.dtype
    a = decay.to(dtype).exp() if log else decay.to(dtype)
    u = x.to(dtype) if b is None else b.to(dtype) * x.to(dtype)
    h = a * h + u
    return (h if c is None else c.to(dtype) * h).to(x.dtype), h
