"""The backward of ssd_bidirectional on Triton: that of ssd for each direction, the second adding to dx of the first."""

from math import inf

from torch import Tensor

from ssmscan.ops.ssd.bidirectional.kernel_fwd import both_ways
from ssmscan.ops.ssd.configs import choose
from ssmscan.ops.ssd.kernel_bwd import gate, scan_gradients


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
    dx = x.new_empty(x.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    if z is not None and x.numel() > 0:
        y = x.new_empty(x.shape, dtype=choose(x, B.shape[3], backward=True).dtype)
        both_ways(x, dt, A, B, C, D, None, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift, y)
        dy = gate(dy, y, z, dz)
    common = (h0, sequence, dy, None, (softplus, 0.0, inf))
    dtype = choose(x, B.shape[3], backward=True).dtype
    added = dx if dx.dtype is dtype else x.new_empty(x.shape, dtype=dtype)
    ddt, dA, dB, dC, dD, dbias = scan_gradients(
        x, dt, A, B, C, D, None, dt_bias, *common, False, added, shift=shift
    )  # fmt: skip
    ddt_rev, dA_rev, dB_rev, dC_rev, _, dbias_rev = scan_gradients(
        x, dt_rev, A, B_rev, C_rev, None, None, dt_bias, *common, True, dx, shift=shift, added=added
    )  # fmt: skip
    return dx, ddt, dA + dA_rev, dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, dbias + dbias_rev
