"""What a stretch of tokens does to the state that enters it, without the tokens' outputs: h -> decay·h + s.

And for the backward what the outputs' gradients make of the state that entered:

    s = Σ_t exp(A Σ_{t'>t} δ_t') δ_t x_t B_t,    dh = Σ_t exp(A Σ_{t'≤t} δ_t') silu(z_t) dy_t C_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.recurrence import grown
from ssmscan.ops.selective_scan.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

# Tokens whose states exist at a time.
AT_ONCE = 64


def summary(inputs: Inputs, options: Options, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The decay and the state s, both (b, d, n), or given ``dy`` in place of s the gradient dh.

    The sequences are not packed; what stands before them, h0, does not count.
    """
    x, dt, A, B, C, D, z, dt_bias, h0, _ = inputs
    softplus, reverse = options
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = F.softplus(delta) if softplus else delta
    rate = A.to(dtype)
    decay = torch.exp(delta.sum(1)[..., None] * rate)
    if dy is None:
        u, v = x * delta, B
        # From the last token on, of those that follow each.
        delta = F.pad(delta[:, :-1] if reverse else delta[:, 1:], (0, 0, 1, 0) if reverse else (0, 0, 0, 1))
    else:
        u, v = dy if z is None else dy * F.silu(z), C
    sums = delta.cumsum(1) if reverse == (dy is None) else delta.flip(1).cumsum(1).flip(1)
    state = torch.zeros_like(decay)
    width = x.shape[2] // v.shape[2]
    for part in zip(*(t.split(AT_ONCE, 1) for t in (sums, u.to(dtype), v.to(dtype))), strict=True):
        sums, u, v = part
        weighted = grown(u[..., None], sums[..., None] * rate)
        state += (weighted * v.repeat_interleave(width, 2)).sum(1)
    return decay, state
