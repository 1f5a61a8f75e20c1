"""Two runs of ssd's Numba kernels, one in each direction, and what stands around them."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.parallel import empty
from ssmscan.ops.ssd import cpu
from ssmscan.ops.ssd.bidirectional.chunked import after
from ssmscan.shapes import state_dtype


def forward(
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
    y = empty(*x.shape, dtype=wide.dtype)
    y.zero_() if D is None else torch.mul(D.to(wide.dtype).view(x.shape[2], -1), wide, out=y)
    for reverse, dt_, B_, C_ in ((False, dt, B, C), (True, dt_rev, B_rev, C_rev)):
        part, _ = cpu.forward(
            wide, dt_, A, B_, C_, None, None, dt_bias, h0, sequence, softplus, 0.0, inf, reverse
        )  # fmt: skip
        y += after(part, sequence, reverse) if shift else part
    if z is not None:
        y.mul_(F.silu(z.to(wide.dtype)))
    return y.to(x.dtype)


def backward(
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
    dy: Tensor,
    softplus: bool,
    shift: bool,
) -> tuple[Tensor, ...]:
    wide = x.to(state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias))
    dy = dy.to(wide.dtype)
    dz = x.new_empty(0)
    if z is not None:
        y = forward(
            wide, dt, A, B, C, D, None, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift
        )  # fmt: skip
        gate = z.to(wide.dtype)
        sigmoid = gate.sigmoid()
        dz = torch.empty(z.shape, dtype=z.dtype).copy_(dy * y * sigmoid * (1 + gate * (1 - sigmoid)))
        dy = dy * gate * sigmoid
    dx = empty(*x.shape, dtype=wide.dtype)
    dD = x.new_empty(0)
    if D is None:
        dx.zero_()
    else:
        torch.mul(D.to(wide.dtype).view(x.shape[2], -1), dy, out=dx)
        dD = (dy * wide).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    parts = []
    for reverse, dt_, B_, C_ in ((False, dt, B, C), (True, dt_rev, B_rev, C_rev)):
        # What came from the token before goes back to it.
        own = after(dy, sequence, not reverse) if shift else dy
        part, *rest = cpu.backward(
            wide, dt_, A, B_, C_, None, None, dt_bias, h0, sequence, own, None, softplus, 0.0, inf, reverse, False
        )  # fmt: skip
        dx += part
        parts.append(rest)
    (ddt, dA, dB, dC, _, _, dbias, _), (ddt_rev, dA_rev, dB_rev, dC_rev, _, _, dbias_rev, _) = parts
    dA, dbias = dA + dA_rev, dbias + dbias_rev
    return torch.empty(x.shape, dtype=x.dtype).copy_(dx), ddt, dA, dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, dbias
