"""The convolution as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor

from ssmscan.ops.decoding import advance
from ssmscan.shapes import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    bounds: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    dtype = state_dtype(x, weight, bias, h0)
    s = batch if bounds is None else bounds.shape[0] - 1
    h = x.new_zeros(s, weight.shape[1] - 1, d, dtype=dtype) if h0 is None else h0.to(dtype, copy=True)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs = x.unbind(1)
    for t in reversed(range(l)) if reverse else range(l):
        ys[t], states[owner[t]] = _token(xs[t], weight, bias, states[owner[t]], silu)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, state_indices: Tensor | None, silu: bool
) -> Tensor:
    def token(x, h):
        return _token(x, weight, bias, h, silu)

    return advance(token, (x,), h, state_indices, x.dim() == 3, state_dtype(x, weight, bias, h))


def _token(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The output for one token, and the state after it; what a state holds beyond w - 1 inputs only moves up."""
    inputs = torch.cat([h, x[:, None].to(h.dtype)], 1)
    z = (inputs[:, -weight.shape[1] :] * weight.t().to(h.dtype)).sum(1)
    if bias is not None:
        z = z + bias.to(h.dtype)
    return (z * torch.sigmoid(z) if silu else z).to(x.dtype), inputs[:, 1:]
