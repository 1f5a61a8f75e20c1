"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor

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
    xs, decays = (v.to(dtype).unbind(1) for v in (x, decay))
    bs, cs = (None if v is None else v.to(dtype).unbind(1) for v in (b, c))
    for t in reversed(range(l)) if reverse else range(l):
        a_t = decays[t].exp() if log else decays[t]
        u_t = xs[t] if bs is None else bs[t] * xs[t]
        h = a_t * states[owner[t]] + u_t
        states[owner[t]] = h
        ys[t] = (h if cs is None else cs[t] * h).to(x.dtype)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def linear_scan_step(x: Tensor, decay: Tensor, b: Tensor | None, c: Tensor | None, h: Tensor, log: bool) -> Tensor:
    a = decay.to(h.dtype).exp() if log else decay.to(h.dtype)
    u = x.to(h.dtype) if b is None else b.to(h.dtype) * x.to(h.dtype)
    # Its own memory, for y may be it.
    state = a * h + u
    h.copy_(state)
    return (state if c is None else c.to(h.dtype) * state).to(x.dtype)
