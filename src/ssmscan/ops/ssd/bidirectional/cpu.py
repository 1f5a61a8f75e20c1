"""Two runs of ssd's Numba kernels, one in each direction, and what stands around them."""

from math import inf

import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.ssd import cpu
from ssmscan.ops.ssd.bidirectional.plain import after
from ssmscan.ops.ssd.bidirectional.directions import given, shared
from ssmscan.shapes import state_dtype


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_rev: Tensor | None,
    B_rev: Tensor | None,
    C_rev: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    shift: bool,
) -> Tensor:
    wide = x.to(state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias))
    dt_back, B_back, C_back = given((dt_rev, B_rev, C_rev), (dt, B, C))
    common = (None, dt_bias, h0, sequence, softplus, 0.0, inf)
    y, _ = cpu.forward(wide, dt, A, B, C, None if shift else D, *common, False)
    other, _ = cpu.forward(wide, dt_back, A, B_back, C_back, None, *common, True)
    if shift:
        y.copy_(after(y, sequence, False))
        other = after(other, sequence, True)
        if D is not None:
            y.addcmul_(D.to(wide.dtype).view(x.shape[2], -1), wide)
    y += other
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
    dt_rev: Tensor | None,
    B_rev: Tensor | None,
    C_rev: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    dy: Tensor,
    softplus: bool,
    shift: bool,
) -> tuple[Tensor, ...]:
    wide = x.to(state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias))
    dt_back, B_back, C_back = given((dt_rev, B_rev, C_rev), (dt, B, C))
    dy = dy.to(wide.dtype)
    dz = x.new_empty(0)
    if z is not None:
        y = forward(
            wide, dt, A, B, C, D, None, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift
        )  # fmt: skip
        dy, dz = cpu.ungate(dy, y, z)
    # What came from the token before goes back to it.
    own, own_rev = (after(dy, sequence, back) for back in (True, False)) if shift else (dy, dy)
    common, wanted = (None, dt_bias, h0, sequence), (None, softplus, 0.0, inf)
    dx, ddt, dA, dB, dC, dD, _, dbias, _ = cpu.backward(
        wide, dt, A, B, C, None if shift else D, *common, own, *wanted, False, False
    )  # fmt: skip
    part, ddt_rev, dA_rev, dB_rev, dC_rev, _, _, dbias_rev, _ = cpu.backward(
        wide, dt_back, A, B_back, C_back, None, *common, own_rev, *wanted, True, False
    )  # fmt: skip
    dx += part
    if shift and D is not None:
        dx.addcmul_(D.to(wide.dtype).view(x.shape[2], -1), dy)
        dD = (dy * wide).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    ddt, ddt_rev = shared(ddt, ddt_rev, dt_rev)
    dB, dB_rev = shared(dB, dB_rev, B_rev)
    dC, dC_rev = shared(dC, dC_rev, C_rev)
    return dx.to(x.dtype), ddt, dA + dA_rev, dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, dbias + dbias_rev
