"""Two runs of ssd's Numba kernels, one in each direction, and what stands around them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.ssd import cpu
from ssmscan.ops.ssd.autograd import Options as ScanOptions
from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.bidirectional.directions import directions, shared, total
from ssmscan.ops.ssd.bidirectional.plain import after
from ssmscan.shapes import state_dtype


def forward(inputs: Inputs, options: Options) -> Tensor:
    y = _ungated(inputs, options)
    if inputs.z is not None:
        y.mul_(F.silu(inputs.z.to(y.dtype)))
    return y.to(inputs.x.dtype)


def _ungated(inputs: Inputs, options: Options) -> Tensor:
    """y before its gate, in the dtype of states."""
    bounds, shift = options[:3], options.shift
    D, sequence = inputs.D, inputs.sequence
    wide = inputs.x.to(state_dtype(*inputs[:11]))
    forth, back = (scan._replace(x=wide) for scan in directions(inputs))
    y, _ = cpu.forward(forth._replace(D=None) if shift else forth, ScanOptions(*bounds, False))
    other, _ = cpu.forward(back, ScanOptions(*bounds, True))
    if shift:
        y.copy_(after(y, sequence, False))
        other = after(other, sequence, True)
        if D is not None:
            y.addcmul_(D.to(wide.dtype).view(wide.shape[2], -1), wide)
    return y.add_(other)


def backward(inputs: Inputs, dy: Tensor, options: Options, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    bounds, shift = options[:3], options.shift
    x, D, z, sequence = inputs.x, inputs.D, inputs.z, inputs.sequence
    wide = x.to(state_dtype(*inputs[:11]))
    dy, dz = dy.to(wide.dtype), None
    if z is not None:
        dy, dz = cpu.ungate(dy, _ungated(inputs, options), z)
    forth, back = (scan._replace(x=wide) for scan in directions(inputs))
    # What came from the token before goes back to it.
    own, own_rev = (after(dy, sequence, end) for end in (True, False)) if shift else (dy, dy)
    wanted = (True,) * 8 + (False,)
    dx, ddt, dA, dB, dC, dD, _, dbias, _ = cpu.backward(
        forth._replace(D=None) if shift else forth, own, None, ScanOptions(*bounds, False), wanted
    )
    part, ddt_rev, dA_rev, dB_rev, dC_rev, _, _, dbias_rev, _ = cpu.backward(
        back, own_rev, None, ScanOptions(*bounds, True), wanted
    )
    assert dx is not None
    assert part is not None
    dx += part
    if shift and D is not None:
        dx.addcmul_(D.to(wide.dtype).view(x.shape[2], -1), dy)
        dD = (dy * wide).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    ddt, ddt_rev = shared(ddt, ddt_rev, inputs.dt_rev)
    dB, dB_rev = shared(dB, dB_rev, inputs.B_rev)
    dC, dC_rev = shared(dC, dC_rev, inputs.C_rev)
    dA, dbias = total(dA, dA_rev), total(dbias, dbias_rev)
    return [dx.to(x.dtype), ddt, dA, dB, dC, dD, dz, ddt_rev, dB_rev, dC_rev, dbias]
