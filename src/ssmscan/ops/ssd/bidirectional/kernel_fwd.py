"""The forward of ssd_bidirectional on Triton: ssd's walk from the right, then one from the left that adds to it."""

from math import inf

from torch import Tensor

from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.bidirectional.directions import given
from ssmscan.ops.ssd.configs import tiles_for
from ssmscan.ops.ssd.kernel_fwd import float32, table
from ssmscan.ops.ssd.kernel_walk import walk
from ssmscan.ops.ssd.step_sizes import steps


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
    y = x.new_empty(x.shape)
    both_ways(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift, y)
    return y


def both_ways(
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
    y: Tensor,
) -> None:
    """Write ``y``, of the tiles' dtype or of x's."""
    if y.numel() == 0:
        return
    tiles = tiles_for(x, B.shape[3], backward=False)
    dt_back, B_back, C_back = given((dt_rev, B_rev, C_rev), (dt, B, C))
    x, B, C, B_back, C_back = (channels_last(v) for v in (x, B, C, B_back, C_back))
    A, dt_bias, options = float32(A), float32(dt_bias), (softplus, 0.0, inf)
    added = x.new_empty(x.shape, dtype=tiles.dtype)
    chunks = None if h0 is None else table(sequence, h0, tiles, True)
    sizes = steps([(dt_back, True)], A, dt_bias, [chunks], tiles, options)
    walk(x, B_back, sizes, h0, chunks, tiles, True, c=C_back, shift=shift, y=added)
    chunks = None if h0 is None else table(sequence, h0, tiles, False)
    sizes = steps([(dt, False)], A, dt_bias, [chunks], tiles, options)
    walk(x, B, sizes, h0, chunks, tiles, False, c=C, D=D, z=channels_last(z), added=added, shift=shift, y=y)
