"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor

from ssmscan.ops.decoding import advance
from ssmscan.shapes import state_dtype


def matrix_scan(
    x: Tensor, log_a: Tensor, h0: Tensor | None, sequence: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, l, r, c = x.shape
    dtype = state_dtype(x, log_a, h0)
    h = x.new_zeros(batch, r, c, dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs, log_as = (v.unbind(1) for v in (x, log_a))
    for t in reversed(range(l)) if reverse else range(l):
        ys[t], states[owner[t]] = _token(xs[t], log_as[t], states[owner[t]])
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def matrix_scan_step(x: Tensor, log_a: Tensor, h: Tensor, state_indices: Tensor | None) -> Tensor:
    return advance(_token, (x, log_a), h, state_indices, x.dim() == 4, state_dtype(x, log_a, h))


def _token(x: Tensor, log_a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The output of one token, (b, r, c), and the state after it; log_a is (b, r)."""
    h = log_a[..., None].to(h.dtype).exp() * h + x.to(h.dtype)
    return h.to(x.dtype), h
