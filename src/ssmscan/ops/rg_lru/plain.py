"""The scan in plain PyTorch, differentiable any number of times, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.decoding import advance
from ssmscan.ops.packing import first_tokens
from ssmscan.ops.recurrence import recurrence
from ssmscan.ops.rg_lru.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

# The largest derivative of √(1 − a²) in log a.
BOUND = 1000.0


def rg_lru(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, input_gate, recurrence_gate, a_param, h0, sequence = inputs
    reverse, scale_first = options
    batch, _, d = x.shape
    dtype = state_dtype(x, input_gate, recurrence_gate, a_param, h0)
    h = x.new_zeros(batch, d, dtype=dtype) if h0 is None else h0.to(dtype)
    a, gain, u = _decay_and_input(x, input_gate, recurrence_gate, a_param, dtype)
    if not scale_first:
        first = first_tokens(x.new_zeros(x.shape[1]) if sequence is None else sequence, reverse)
        gain = torch.where(first[:, None], 1, gain)
    hs, final = recurrence(a, gain * u, h, sequence, reverse)
    return hs.to(x.dtype), final


def rg_lru_step(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, a_param: Tensor, h: Tensor, state_indices: Tensor | None
) -> Tensor:
    def token(x, input_gate, recurrence_gate, h):
        a, gain, u = _decay_and_input(x, input_gate, recurrence_gate, a_param, h.dtype)
        h = a * h + gain * u
        return h.to(x.dtype), h

    inputs = (x, input_gate, recurrence_gate)
    return advance(token, inputs, h, state_indices, x.dim() == 3, state_dtype(*inputs, a_param, h))


def _decay_and_input(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, a_param: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """a, √(1 − a²), and the gated input."""
    log_a = -8 * recurrence_gate.to(dtype).sigmoid() * F.softplus(a_param.to(dtype))
    return log_a.exp(), _gain(log_a), input_gate.to(dtype).sigmoid() * x.to(dtype)


def _gain(log_a: Tensor) -> Tensor:
    """√(1 − a²), whose derivative is that of a straight line where it would exceed the bound."""
    # The derivative of expm1 is computed from its value, which loses digits of a small a².
    square = torch.where(log_a > -0.25, -torch.expm1(2 * log_a), 1 - torch.exp(2 * log_a))
    line = square * (BOUND / 2)
    bent = line + (square.sqrt() - line).detach()
    return torch.where(square < BOUND**-2, bent, square.clamp(min=BOUND**-2).sqrt())
