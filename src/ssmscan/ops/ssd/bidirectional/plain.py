"""Both scans by matrix products within chunks, in plain PyTorch; differentiable any number of times, on any device."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.packing import first_tokens
from ssmscan.ops.ssd.plain import ssd
from ssmscan.shapes import state_dtype


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_rev: Tensor,
    B_rev: Tensor,
    C_rev: Tensor,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    shift: bool,
) -> Tensor:
    wide = x.to(state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias))
    common = (None, dt_bias, h0, sequence, softplus, 0.0, inf)
    forward, _ = ssd(wide, dt, A, B, C, None if shift else D, *common, False)
    backward, _ = ssd(wide, dt_rev, A, B_rev, C_rev, None, *common, True)
    if shift:
        y = after(forward, sequence, False) + after(backward, sequence, True)
        y = y if D is None else y + D.to(wide.dtype).view(x.shape[2], -1) * wide
    else:
        y = forward + backward
    return (y if z is None else y * F.silu(z.to(wide.dtype))).to(x.dtype)


def after(v: Tensor, sequence: Tensor | None, reverse: bool) -> Tensor:
    """At each token what v, (b, l, ...), has at the token before it in scan order; 0 at a sequence's first."""
    v = torch.cat([v[:, 1:], v[:, :1]] if reverse else [v[:, -1:], v[:, :-1]], 1)
    token = torch.arange(v.shape[1], device=v.device)
    if sequence is not None:
        first = first_tokens(sequence, reverse)
    else:
        first = token == (v.shape[1] - 1 if reverse else 0)
    return v.masked_fill(first.view(-1, *(1,) * (v.dim() - 2)), 0)
