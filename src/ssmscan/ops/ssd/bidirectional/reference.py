"""Both scans as plain loops over time, and their sum token by token. In float64 the oracle of every other backend."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.ssd.reference import ssd
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
    l, heads = x.shape[1:3]
    wide = x.to(state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias))
    common = (None, None, dt_bias, h0, sequence, softplus, 0.0, inf)
    forward = ssd(wide, dt, A, B, C, *common, False)[0].unbind(1)
    backward = ssd(wide, dt_rev, A, B_rev, C_rev, *common, True)[0].unbind(1)
    owner = [0] * l if sequence is None else sequence.tolist()
    ys = []
    for t, x_t in enumerate(wide.unbind(1)):
        y = x_t * (0 if D is None else D.to(wide.dtype).view(heads, -1))
        if not shift:
            y = y + forward[t] + backward[t]
        else:
            if t > 0 and owner[t - 1] == owner[t]:
                y = y + forward[t - 1]
            if t + 1 < l and owner[t + 1] == owner[t]:
                y = y + backward[t + 1]
        ys.append(y)
    if not ys:
        return x * 1
    y = torch.stack(ys, 1)
    return (y if z is None else y * F.silu(z.to(wide.dtype))).to(x.dtype)
