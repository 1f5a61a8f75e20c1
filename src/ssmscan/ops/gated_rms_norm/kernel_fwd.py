"""The forward of gated_rms_norm, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options
from ssmscan.ops.gated_rms_norm.configs import FORWARD, tiling


@triton.jit
def load_tile(pointer, stride, row, N, channels, SIZE, EVEN: tl.constexpr):
    """The channels of some rows as float32; zeros where there are none."""
    mask = (row < N)[:, None]
    if not EVEN:
        mask &= (channels < SIZE)[None, :]
    pointers = pointer + (row.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, stride, tile, row, N, channels, SIZE, EVEN: tl.constexpr):
    """Store where :func:`load_tile` with the same arguments would load."""
    mask = (row < N)[:, None]
    if not EVEN:
        mask &= (channels < SIZE)[None, :]
    pointers = pointer + (row.to(tl.int64) * stride)[:, None] + channels[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N"])
def gated_rms_norm_forward(
    x, weight, z, y, squares,
    N, GROUPS, SIZE, x_row, z_row,
    EPS: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One group of every so many tiles of ROWS rows; AFTER puts the gate behind the norm.

    With ``squares`` y is not divided by anything, and the sum of its group's squares stored there.
    """
    group = tl.program_id(0) % GROUPS
    walker = tl.program_id(0) // GROUPS
    first = tl.cast(group, tl.int64) * SIZE
    channels = tl.arange(0, PADDED)
    scale = tl.load(weight + first + channels, mask=channels < SIZE, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(walker, tl.cdiv(N, ROWS), tl.num_programs(0) // GROUPS, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        u = load_tile(x + first, x_row, row, N, channels, SIZE, EVEN)
        if z is not None:
            v = load_tile(z + first, z_row, row, N, channels, SIZE, EVEN)
            gate = v * sigmoid(v)
            if not AFTER:
                u *= gate
        total = tl.sum(u * u, 1)
        if squares is not None:
            tl.store(squares + row.to(tl.int64) * GROUPS + group, total, mask=row < N)
            u *= scale
        else:
            u *= tl.rsqrt(total / SIZE + EPS)[:, None] * scale
        # Two conditions, not one: the first is settled at compile time.
        if z is not None:  # noqa: SIM102
            if AFTER:
                u *= gate
        store_tile(y + first, GROUPS * SIZE, u, row, N, channels, SIZE, EVEN)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., d) as (n, d), copied where its rows do not lie at one distance."""
    return channels_last(tensor.reshape(-1, tensor.shape[-1]))


def forward(inputs: Inputs, options: Options, divided: bool = True) -> Tensor | tuple[Tensor, Tensor]:
    """y; where it is not to be ``divided`` by the root, y without that, and the sum of squares of each group."""
    x, weight, z = inputs
    eps, size, norm_before_gate, dtype = options
    y = x.new_empty(x.shape, dtype=dtype)
    squares = None if divided else x.new_empty(*x.shape[:-1], x.shape[-1] // size, dtype=torch.float32)
    if y.numel() == 0:
        return y if squares is None else (y, squares)
    x, z = as_rows(x), None if z is None else as_rows(z)
    n, d = x.shape
    width = padded(size)
    row_bytes = width * (x.element_size() + (0 if z is None else z.element_size()))
    groups, rows, walkers, warps, stages = tiling(FORWARD[x.dtype.itemsize], n, d // size, width, row_bytes)
    gated_rms_norm_forward.launch(
        (groups * walkers, 1, 1),
        (x, weight.contiguous(), z, y, squares),
        (n, groups, size, x.stride(0), 0 if z is None else z.stride(0)),
        (eps, norm_before_gate, rows, width, size == width, stages),
        warps,
    )
    return y if squares is None else (y, squares)
