"""The backward of ssd_bidirectional on Triton: that of ssd for each direction, the second adding to dx of the first.

Where both directions read the same B and C, all but the walks is done once for both.
"""

from math import inf

from torch import Tensor

from ssmscan.ops.ssd.bidirectional.directions import given, shared
from ssmscan.ops.ssd.bidirectional.kernel_fwd import both_ways
from ssmscan.ops.ssd.configs import tiles_for
from ssmscan.ops.ssd.kernel_bwd import gate, joint, scan_gradients


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
    dx = x.new_empty(x.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    if z is not None and x.numel() > 0:
        y = x.new_empty(x.shape, dtype=tiles_for(x, B.shape[3], backward=True).dtype)
        both_ways(x, dt, A, B, C, D, None, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift, y)
        dy = gate(dy, y, z, dz)
    common = (h0, sequence, dy, None, (softplus, 0.0, inf))
    dt_back, B_back, C_back = given((dt_rev, B_rev, C_rev), (dt, B, C))
    if B_rev is None and C_rev is None and joint(x, B, sequence, shift):
        (ddt, ddt_rev), (dA, dB, dC, dD, dbias) = scan_gradients(
            x, [(dt, False), (dt_back, True)], A, B, C, D, None, dt_bias, *common, dx
        )  # fmt: skip
        ddt, ddt_rev = shared(ddt, ddt_rev, dt_rev)
        return dx, ddt, dA, dB, dC, dD, dz, ddt_rev, dB.new_empty(0), dC.new_empty(0), dbias
    dtype = tiles_for(x, B.shape[3], backward=True).dtype
    added = dx if dx.dtype is dtype else x.new_empty(x.shape, dtype=dtype)
    (ddt,), (dA, dB, dC, dD, dbias) = scan_gradients(
        x, [(dt, False)], A, B, C, D, None, dt_bias, *common, added, shift=shift
    )  # fmt: skip
    (ddt_rev,), (dA_rev, dB_rev, dC_rev, _, dbias_rev) = scan_gradients(
        x, [(dt_back, True)], A, B_back, C_back, None, None, dt_bias, *common, dx, shift=shift, added=added
    )  # fmt: skip
    ddt, ddt_rev = shared(ddt, ddt_rev, dt_rev)
    dB, dB_rev = shared(dB, dB_rev, B_rev)
    dC, dC_rev = shared(dC, dC_rev, C_rev)
    return dx, ddt, dA + dA_rev, dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, dbias + dbias_rev
