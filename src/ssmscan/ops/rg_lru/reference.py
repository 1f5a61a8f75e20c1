"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.shapes import state_dtype


class _Gain(torch.autograd.Function):
    """√(1 − a²) of log a, whose derivative −a²/√(1 − a²) is bounded by 1000."""

    @staticmethod
    def forward(ctx, log_a):
        gain = torch.sqrt(-torch.expm1(2 * log_a))
        ctx.save_for_backward(log_a, gain)
        return gain

    @staticmethod
    def backward(ctx, gradient):
        log_a, gain = ctx.saved_tensors
        return -gradient * torch.exp(2 * log_a) / gain.clamp(min=1e-3)


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    h0: Tensor | None,
    sequence: Tensor | None,
    reverse: bool,
    scale_first: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    dtype = state_dtype(x, input_gate, recurrence_gate, a_param, h0)
    h = x.new_zeros(batch, d, dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    ys: list[Tensor] = [x] * l
    xs, input_gates, recurrence_gates = (v.unbind(1) for v in (x, input_gate, recurrence_gate))
    unscaled = set() if scale_first else set(owner)
    for t in reversed(range(l)) if reverse else range(l):
        scale = owner[t] not in unscaled
        unscaled.discard(owner[t])
        h = _next(xs[t], input_gates[t], recurrence_gates[t], a_param, states[owner[t]], scale)
        states[owner[t]] = h
        ys[t] = h.to(x.dtype)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, torch.cat(states) if states else h


def _next(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, a_param: Tensor, h: Tensor, scale: bool) -> Tensor:
    x, i, r, parameter = (v.to(h.dtype) for v in (x, input_gate, recurrence_gate, a_param))
    log_a = -8 * torch.sigmoid(r) * F.softplus(parameter)
    u = torch.sigmoid(i) * x
    return torch.exp(log_a) * h + (_Gain.apply(log_a) * u if scale else u)
