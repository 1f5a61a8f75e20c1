"""The forward of ssd_bidirectional on Triton: ssd's walk from the right, then one from the left that adds to it."""

from torch import Tensor

from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.bidirectional.directions import directions
from ssmscan.ops.ssd.configs import tiles_for
from ssmscan.ops.ssd.kernel_fwd import float32, table
from ssmscan.ops.ssd.kernel_walk import walk
from ssmscan.ops.ssd.step_sizes import steps


def forward(inputs: Inputs, options: Options) -> Tensor:
    y = inputs.x.new_empty(inputs.x.shape)
    both_ways(inputs, options, inputs.z, y)
    return y


def both_ways(inputs: Inputs, options: Options, z: Tensor | None, y: Tensor) -> None:
    """Write ``y``, of the tiles' dtype or of x's, gated by ``z``."""
    if y.numel() == 0:
        return
    forth, back = directions(inputs)
    tiles = tiles_for(inputs.x, inputs.B.shape[3], backward=False)
    x, A, dt_bias, h0 = channels_last(inputs.x), float32(inputs.A), float32(inputs.dt_bias), inputs.h0
    added = x.new_empty(x.shape, dtype=tiles.dtype)
    for scan, reverse in ((back, True), (forth, False)):
        B, C = channels_last(scan.B), channels_last(scan.C)
        chunks = None if h0 is None else table(scan.sequence, h0, tiles, reverse)
        sizes = steps([(scan.dt, reverse)], A, dt_bias, [chunks], tiles, options[:3])
        given = (x, B, sizes, h0, chunks, tiles, reverse)
        if reverse:
            walk(*given, c=C, shift=options.shift, y=added)
        else:
            walk(*given, c=C, D=scan.D, z=channels_last(z), added=added, shift=options.shift, y=y)
