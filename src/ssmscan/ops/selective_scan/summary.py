"""What a stretch of tokens does to the state that enters it, without the tokens' outputs: h -> decay·h + s.

And for the backward what the outputs' gradients make of the state that entered:

    s = Σ_t exp(A Σ_{t'>t} δ_t') δ_t x_t B_t,    dh = Σ_t exp(A Σ_{t'≤t} δ_t') silu(z_t) dy_t C_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.recurrence import grown
from ssmscan.ops.selective_scan.autograd import Options
from ssmscan.ops.selective_scan.op import check
from ssmscan.shapes import state_dtype

# Tokens whose states exist at a time.
AT_ONCE = 64


def summary(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    dy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The decay and the state s, both (b, d, n), or given ``dy`` in place of s the gradient dh.

    The other arguments are those of :func:`ssmscan.selective_scan`, on sequences that are not packed.
    """
    B, C = check("selective_scan", "b, l", x, dt, A, B, C, D, z, dt_bias, None)
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = F.softplus(delta) if dt_softplus else delta
    rate = A.to(dtype)
    decay = torch.exp(delta.sum(1)[..., None] * rate)
    u, v = (x, B) if dy is None else (dy, C)
    if choose("selective_scan", backend, x.device.type, dtype) == "triton" and x.numel() > 0:
        from ssmscan.ops.selective_scan.kernel_fwd import states

        gate = None if dy is None else z
        return decay, states(u, v, dt, A, gate, dt_bias, Options(dt_softplus, reverse), adjoint=dy is not None)
    if dy is None:
        u = u * delta
        # From the last token on, of those that follow each.
        delta = F.pad(delta[:, :-1] if reverse else delta[:, 1:], (0, 0, 1, 0) if reverse else (0, 0, 0, 1))
    elif z is not None:
        u = u * F.silu(z)
    sums = delta.cumsum(1) if reverse == (dy is None) else delta.flip(1).cumsum(1).flip(1)
    state = torch.zeros_like(decay)
    width = x.shape[2] // v.shape[2]
    for part in zip(*(t.split(AT_ONCE, 1) for t in (sums, u.to(dtype), v.to(dtype))), strict=True):
        sums, u, v = part
        weighted = grown(u[..., None], sums[..., None] * rate)
        state += (weighted * v.repeat_interleave(width, 2)).sum(1)
    return decay, state
