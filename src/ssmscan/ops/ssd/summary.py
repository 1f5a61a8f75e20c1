"""What a stretch of tokens does to the state that enters it, without the tokens' outputs: h -> decay·h + s.

And for the backward what the outputs' gradients make of the state that entered:

    s = Σ_t exp(A Σ_{t'>t} Δ_t') Δ_t x_t ⊗ B_t,    dh = Σ_t exp(A Σ_{t'≤t} Δ_t') silu(z_t) dy_t ⊗ C_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.recurrence import grown
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.shapes import state_dtype


def summary(inputs: Inputs, options: Options, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The decay, (b, h, 1, 1), and the state s, (b, h, p, n), or given ``dy`` in place of s the gradient dh.

    The sequences are not packed; what stands before them, h0, does not count.
    """
    x, dt, A, B, C, D, z, dt_bias, h0, _ = inputs
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if options.softplus else delta).clamp(options.low, options.high)
    log = delta * A.to(dtype)
    decay = log.sum(1).exp()[..., None, None]
    if dy is None:
        u, v = x * delta[..., None], B
        # From the last token on, of those that follow each.
        log = F.pad(log[:, :-1] if options.reverse else log[:, 1:], (0, 0, 1, 0) if options.reverse else (0, 0, 0, 1))
    else:
        u, v = dy if z is None else dy * F.silu(z), C
    sums = log.cumsum(1) if options.reverse == (dy is None) else log.flip(1).cumsum(1).flip(1)
    weighted = grown(u.to(dtype), sums[..., None]).unflatten(2, (v.shape[2], -1))
    return decay, torch.einsum("blgkp,blgn->bgkpn", weighted, v.to(dtype)).flatten(1, 2)
