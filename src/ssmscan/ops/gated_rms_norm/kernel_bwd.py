"""The backward of gated_rms_norm, and its launcher: every gradient in one pass, the norm computed again from x and z.

With u the normalised input (x·silu(z), or x), n = u·r for r = 1/sqrt(mean(u²) + eps), and a the gradient of n,

    du = r·(a − n·mean(a·n)),    dweight = Σ dy·n  (times silu(z) where the gate comes after),

and where the forward did not divide, but told the sum of squares, n = u and du = a + 2·u·dsquares.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.gradients import room, sum_rows
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options
from ssmscan.ops.gated_rms_norm.configs import BACKWARD, tiling
from ssmscan.ops.gated_rms_norm.kernel_fwd import as_rows, load_tile, store_tile


@kernel(do_not_specialize=["N"])
def gated_rms_norm_backward(
    x, weight, z, dy, dsquares, dx, partial, dz,
    N, GROUPS, SIZE, x_row, z_row, dy_row,
    EPS: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dz of one group of every so many tiles, and their part of dweight; AFTER: the gate is behind the norm."""
    group = tl.program_id(0) % GROUPS
    walker = tl.program_id(0) // GROUPS
    first = tl.cast(group, tl.int64) * SIZE
    channels = tl.arange(0, PADDED)
    inside = channels < SIZE
    scale = tl.load(weight + first + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((ROWS, PADDED), tl.float32)
    for tile in tl.range(walker, tl.cdiv(N, ROWS), tl.num_programs(0) // GROUPS, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        xs = load_tile(x + first, x_row, row, N, channels, SIZE, EVEN)
        g = load_tile(dy + first, dy_row, row, N, channels, SIZE, EVEN)
        u = xs
        a = g
        if z is not None:
            v = load_tile(z + first, z_row, row, N, channels, SIZE, EVEN)
            opening = sigmoid(v)
            gate = v * opening
            slope = opening * (1.0 + v * (1.0 - opening))
            if AFTER:
                a *= gate
            else:
                u *= gate
        n = u
        if dsquares is None:
            inverse = tl.rsqrt(tl.sum(u * u, 1) / SIZE + EPS)[:, None]
            n = u * inverse
        # The gradient of the scaled norm, before and after the scale.
        sums += a * n
        a *= scale
        if dsquares is None:
            mean = tl.sum(a * u, 1)[:, None] * inverse / SIZE
            du = inverse * (a - n * mean)
        else:
            slopes = tl.load(dsquares + row.to(tl.int64) * GROUPS + group, mask=row < N, other=0.0)
            du = a + 2.0 * u * slopes[:, None]
        if z is not None:
            if AFTER:
                dv = g * n * scale * slope
            else:
                dv = du * xs * slope
                du *= gate
            if dz is not None:
                store_tile(dz + first, GROUPS * SIZE, dv, row, N, channels, SIZE, EVEN)
        if dx is not None:
            store_tile(dx + first, GROUPS * SIZE, du, row, N, channels, SIZE, EVEN)
    if partial is not None:
        tl.store(partial + walker.to(tl.int64) * GROUPS * SIZE + first + channels, tl.sum(sums, 0), mask=inside)


def backward(
    inputs: Inputs, dy: Tensor, options: Options, needs: Sequence[bool], dsquares: Tensor | None = None
) -> Sequence[Tensor | None]:
    """The gradients of x, weight and z; ``dsquares`` is that of the sums of squares, of a y that was not divided."""
    x, weight, z = inputs
    eps, size, norm_before_gate, _ = options
    dx, dweight, dz = room(inputs, needs)
    if x.numel() == 0:
        return [dx, dweight if dweight is None else dweight.zero_(), dz]
    x, dy, z = as_rows(x), as_rows(dy), None if z is None else as_rows(z)
    n, d = x.shape
    width = padded(size)
    row_bytes = width * sum(tensor.element_size() for tensor in (x, dy, z) if tensor is not None)
    groups, rows, walkers, warps, stages = tiling(BACKWARD[x.dtype.itemsize], n, d // size, width, row_bytes)
    parts = None if dweight is None else x.new_empty(walkers, d, dtype=torch.float32)
    gated_rms_norm_backward.launch(
        (groups * walkers, 1, 1),
        (x, weight.contiguous(), z, dy, dsquares, dx, parts, dz),
        (n, groups, size, x.stride(0), 0 if z is None else z.stride(0), dy.stride(0)),
        (eps, norm_before_gate, rows, width, size == width, stages),
        warps,
    )
    if parts is not None:
        sum_rows(parts, (d, 0, 0), (dweight, None, None))
    return [dx, dweight, dz]
