"""What a stretch of tokens does to the state that enters it, without the tokens' outputs: h -> decay·h + s.

And for the backward what the outputs' gradients make of the state that entered:

    s = Σ_t exp(A Σ_{t'>t} Δ_t') Δ_t x_t ⊗ B_t,    dh = Σ_t exp(A Σ_{t'≤t} Δ_t') silu(z_t) dy_t ⊗ C_t
"""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.recurrence import grown
from ssmscan.ops.ssd.autograd import Options
from ssmscan.ops.ssd.op import check
from ssmscan.shapes import state_dtype


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
    dt_limit: tuple[float, float] = (0.0, inf),
    reverse: bool = False,
    backend: str = "auto",
    dy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The decay, (b, h, 1, 1), and the state s, (b, h, p, n), or given ``dy`` in place of s the gradient dh.

    The other arguments are those of :func:`ssmscan.ssd`, on sequences that are not packed.
    """
    check("ssd", "b, l, ", x, dt, A, B, C, D, z, dt_bias, dt_limit, None)
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias)
    options = Options(dt_softplus, float(dt_limit[0]), float(dt_limit[1]), reverse)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(options.low, options.high)
    log = delta * A.to(dtype)
    decay = log.sum(1).exp()[..., None, None]
    u, v = (x, B) if dy is None else (dy if z is None else dy * F.silu(z), C)
    if choose("ssd", backend, x.device.type, dtype) == "triton" and x.numel() > 0:
        from ssmscan.ops.ssd.kernel_fwd import states

        return decay, states(u.to(x.dtype), v, dt, A, dt_bias, options, adjoint=dy is not None)
    if dy is None:
        u = u * delta[..., None]
        # From the last token on, of those that follow each.
        log = F.pad(log[:, :-1] if reverse else log[:, 1:], (0, 0, 1, 0) if reverse else (0, 0, 0, 1))
    sums = log.cumsum(1) if reverse == (dy is None) else log.flip(1).cumsum(1).flip(1)
    weighted = grown(u.to(dtype), sums[..., None]).unflatten(2, (v.shape[2], -1))
    return decay, torch.einsum("blgkp,blgn->bgkpn", weighted, v.to(dtype)).flatten(1, 2)
