"""B and C in the order in which the backward's lanes read them, and their gradients out of the order that these leave.

Both lie in memory by batch row, group and tile of four steps; see :func:`~.lanes.sum_channels` for the gradients.
"""

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.selective_scan.configs import BackwardConfig

# Elements that a program takes at a time: of B and C; of the parts of dB and dC, and of so many of these at once.
BLOCK = 2048
SUMS, PARTS = 256, 8


@kernel(do_not_specialize=["L"])
def interleave_states(
    B, C, rows, L, n, groups, blocks, B_batch, B_time, B_group, B_state, C_batch, C_time, C_group, C_state,
    REVERSE: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0) // blocks
    batch = (owner // groups).to(tl.int64)
    group = (owner % groups).to(tl.int64)
    t = (tl.program_id(0) % blocks * BT + tl.arange(0, BT)).to(tl.int64)
    state = tl.arange(0, N)
    at = (L - 1 - t if REVERSE else t)[:, None]
    exists = (t < L)[:, None] & (state < n)[None, :]
    steps = tl.cdiv(L, 4) * 4
    out = rows + (owner.to(tl.int64) * steps + t)[:, None] * (2 * N) + state[None, :]
    inside = (t < steps)[:, None] & (state < N)[None, :]
    b = tl.load(B + batch * B_batch + group * B_group + at * B_time + state[None, :] * B_state, mask=exists, other=0.0)
    tl.store(out, b.to(tl.float32), mask=inside)
    c = tl.load(C + batch * C_batch + group * C_group + at * C_time + state[None, :] * C_state, mask=exists, other=0.0)
    tl.store(out + N, c.to(tl.float32), mask=inside)


@kernel(do_not_specialize=["L"])
def separate_states(
    parts, dB, dC, L, n, groups, programs, blocks, REVERSE: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr,
    SUMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dB and dC, (b, l, g, n), from the ``parts`` that programs of different channels have left; the order is fixed."""
    E: tl.constexpr = 8 // CHANNELS
    owner = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * SUMS + tl.arange(0, SUMS)
    size = tl.cdiv(L, 4) * (8 * N)
    # Four steps, E numbers, a quarter of the states, the channels side by side in a warp.
    step = at // (8 * N) * 4 + at % 4
    eighth = at // (N * E) % CHANNELS * E + at // 4 % E
    state = at // (4 * E) % (N // 4) * 4 + eighth % 4
    inside = (at < size) & (step < L) & (state < n)
    totals = tl.zeros((PARTS, SUMS), tl.float32)
    for first in range(0, programs, PARTS):
        program = first + tl.arange(0, PARTS)
        part = (owner.to(tl.int64) * programs + program) * size
        mask = (program < programs)[:, None] & (at < size)[None, :]
        # What lies outside was not written, and is whatever the memory held.
        totals += tl.where(inside[None, :], tl.load(parts + part[:, None] + at[None, :], mask=mask, other=0.0), 0.0)
    total = tl.sum(totals, 0)
    time = (L - 1 - step if REVERSE else step).to(tl.int64)
    out = ((owner // groups).to(tl.int64) * L + time) * groups * n + owner % groups * n + state
    if dB is not None:
        tl.store(dB + out, total.to(dB.dtype.element_ty), mask=inside & (eighth < 4))
    if dC is not None:
        tl.store(dC + out, total.to(dC.dtype.element_ty), mask=inside & (eighth >= 4))


def matrices(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C as the forward reads them: small, and used by every channel, they are converted but once."""
    if B.dtype is torch.float32 and C.dtype is torch.float32:
        return channels_last(B), channels_last(C)
    batch, l, groups, n = B.shape
    N = padded(n)
    rows = B.new_empty(batch, groups, -(-l // 4) * 4, 2, N, dtype=torch.float32)
    interleave(B, C, rows, N, False)
    b, c = rows.unbind(3)
    return b[:, :, :l, :n].transpose(1, 2), c[:, :, :l, :n].transpose(1, 2)


def interleave(B: Tensor, C: Tensor, rows: Tensor, N: int, reverse: bool) -> None:
    """Write B and C in scan order to ``rows``, (b, g, l, 2, N), with zeros up to N states and whole tiles of steps."""
    batch, l, groups, n = B.shape
    BT = max(BLOCK // N, 1)
    blocks = -(-l // BT)
    interleave_states.launch(
        (batch * groups * blocks, 1, 1), (B, C, rows), (l, n, groups, blocks, *_strides(B), *_strides(C)),
        (reverse, N, BT), 4,
    )  # fmt: skip


def separate(
    parts: Tensor, dB: Tensor | None, dC: Tensor | None, shape: tuple[int, ...], config: BackwardConfig, reverse: bool
) -> None:
    """Write dB and dC, of this ``shape``, where they are given; ``parts`` is (b, g, programs, …)."""
    batch, l, groups, n = shape
    blocks = -(-(-(-l // 4) * 8 * config.states) // SUMS)
    separate_states.launch(
        (batch * groups * blocks, 1, 1), (parts, dB, dC), (l, n, groups, parts.shape[2], blocks),
        (reverse, config.states, config.channels, SUMS, PARTS), 4,
    )  # fmt: skip


def _strides(tensor: Tensor) -> tuple[int, int, int, int]:
    batch, time, group, state = tensor.stride()
    return batch, time, group, state
