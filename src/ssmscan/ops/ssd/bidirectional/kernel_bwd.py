"""The backward of ssd_bidirectional on Triton: that of ssd for each direction, the second adding to dx of the first.

Where both directions read the same B and C, all but the walks is done once for both.
"""

from collections.abc import Sequence

from torch import Tensor

from ssmscan.ops._triton.gradients import add
from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.bidirectional.directions import directions, shared
from ssmscan.ops.ssd.bidirectional.kernel_fwd import both_ways
from ssmscan.ops.ssd.configs import tiles_for
from ssmscan.ops.ssd.kernel_bwd import gate, joint, scan_gradients


def backward(inputs: Inputs, dy: Tensor, options: Options, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    x, z, dt_rev, B_rev, C_rev = inputs.x, inputs.z, inputs.dt_rev, inputs.B_rev, inputs.C_rev
    forth, back = directions(inputs)
    bounds, shift = options[:3], options.shift
    dtype = tiles_for(x, forth.B.shape[3], backward=True).dtype
    dx, dz = x.new_empty(x.shape), None if z is None else z.new_empty(z.shape)
    if z is not None and dz is not None and x.numel() > 0:
        y = x.new_empty(x.shape, dtype=dtype)
        both_ways(inputs, options, None, y)
        dy = gate(dy, y, z, dz)
    common = (dy, None, bounds)
    if B_rev is None and C_rev is None and joint(x, forth.B, forth.sequence, shift):
        (ddt, ddt_rev), (dA, dB, dC, dD, dbias) = scan_gradients(
            forth, [(forth.dt, False), (back.dt, True)], *common, dx
        )
        ddt, ddt_rev = shared(ddt, ddt_rev, dt_rev, add)
        return [dx, ddt, dA, dB, dC, dD, dz, ddt_rev, None, None, dbias]
    added = dx if dx.dtype is dtype else x.new_empty(x.shape, dtype=dtype)
    (ddt,), (dA, dB, dC, dD, dbias) = scan_gradients(forth, [(forth.dt, False)], *common, added, shift=shift)
    (ddt_rev,), (dA_rev, dB_rev, dC_rev, _, dbias_rev) = scan_gradients(
        back, [(back.dt, True)], *common, dx, shift=shift, added=added
    )
    ddt, ddt_rev = shared(ddt, ddt_rev, dt_rev, add)
    dB, dB_rev = shared(dB, dB_rev, B_rev, add)
    dC, dC_rev = shared(dC, dC_rev, C_rev, add)
    return [dx, ddt, add(dA, dA_rev), dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, add(dbias, dbias_rev)]
