"""The backward tile-walk of matrix_scan, and its launcher: both gradients in one pass against the scan order.

With g_t the gradient of H_t, in which the returned state's dh and all later steps are included:

    g_t = dy_t + a_{t+1}·g_{t+1},    dx_t = g_t,    dlog_a_t = a_t·Σ_columns g_t·H_{t-1}

The states of 16 steps are recomputed in registers from the one that the forward saved before them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.gradients import room, state_room
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import (
    bits,
    channel_sums,
    channels_last,
    cover,
    edges,
    enter_segment,
    gather_states,
    launch,
    load_rows,
    store_rows,
    zeros,
)
from ssmscan.ops.matrix_scan.autograd import Inputs, Options
from ssmscan.ops.matrix_scan.configs import config
from ssmscan.ops.matrix_scan.kernel_fwd import load_decays


@triton.jit
def _tile(
    x, log_a, dy, h0, sequence, states, dx, da, dh, dh0, g, product,
    x_step, a_step, dy_step, da_step, direction, t, L, columns, R, C,
    SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk back over the 16 steps from position t, which all exist if WHOLE. A SUMMARY tracks g and a's product."""
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 16).to(tl.int64)
    exists = t + row < L
    decays = load_decays(log_a + t * a_step, row * a_step, exists, BD, WHOLE)
    dys = load_rows(dy + t * dy_step, row * dy_step, exists, columns, C, 0.0, BD, EVEN, WHOLE)
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64) * R
        starts = edges(sequence, t, row, direction, L, False)
        ends = edges(sequence, t, row, direction, L, True)
        first = bits(starts)
        last = bits(ends)
        if dh is not None:
            final = gather_states(dh, owner, ends, last, columns, C, BD)
    if da is not None:
        xs = load_rows(x + t * x_step, row * x_step, exists, columns, C, 0.0, BD, EVEN, WHOLE)
        if sequence is not None:
            entering = gather_states(h0, owner, starts, first, columns, C, BD)
        # The decayed states that each step adds to.
        h = tl.load(states + t // 16 * R * C + columns, mask=columns < C, other=0.0)
        decayed = ()
        for i in tl.static_range(16):
            if sequence is not None:
                h = tl.where((first >> i) & 1 != 0, entering[i].to(tl.float32), h)
            h *= decays[i]
            decayed = decayed + (h,)
            h += xs[i].to(tl.float32)
    # The walk goes backward, so the rows are gathered from the front.
    dxs = ()
    das = ()
    gs = ()
    for i in tl.static_range(15, -1, -1):
        if sequence is not None:
            ended = (last >> i) & 1 != 0
            if dh is None:
                g = tl.where(ended, 0.0, g)
            else:
                g = tl.where(ended, final[i].to(tl.float32), g)
        g += dys[i].to(tl.float32)
        dxs = (g,) + dxs
        if da is not None:
            das = (g * decayed[i],) + das
        g *= decays[i]
        gs = (g,) + gs
        product *= decays[i]
    if dx is not None:
        step = direction * R * C
        store_rows(dx + t * step, row * step, exists, dxs, columns, C, BD, EVEN, WHOLE)
    if da is not None:
        sums = channel_sums(das, BD).to(da.dtype.element_ty)
        tl.store(da + (t + row) * da_step, sums, mask=exists)
    # Two conditions, not one: the first is settled at compile time.
    if dh0 is not None and sequence is not None:  # noqa: SIM102
        if first != 0:
            store_rows(dh0, owner * C, starts, gs, columns, C, BD, False, False)
    return g, product


@kernel(do_not_specialize=["L", "length", "segments", "blocks", "direction"])
def matrix_scan_backward(
    # read
    x, log_a, dy, h0, sequence, dh, states,
    # written
    dx, da, dh0,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, R, C, length, segments, blocks, direction,
    # strides
    x_batch, x_time, x_row, a_batch, a_time, a_row, dy_batch, dy_time, dy_row,
    # constants
    SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients over one segment of the sequence, or the SUMMARY of g over it; segments count against the scan."""
    walker = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    columns = block * BD + tl.arange(0, BD)
    inside = columns < C
    batch = (walker // R).to(tl.int64)
    matrix_row = (walker % R).to(tl.int64)
    segment = tl.program_id(1)
    begin = (segments - 1 - segment) * length
    end = min(begin + length, L)
    whole = begin + (end - begin) // 16 * 16
    summary_row = walker.to(tl.int64) * segments * C
    state_row = (batch * R + matrix_row) * C

    origin = tl.where(direction < 0, L - 1, 0).to(tl.int64)
    x += batch * x_batch + matrix_row * x_row + origin * x_time
    log_a += batch * a_batch + matrix_row * a_row + origin * a_time
    dy += batch * dy_batch + matrix_row * dy_row + origin * dy_time
    out = (batch * L + origin) * R + matrix_row
    if dx is not None:
        dx += out * C
    if da is not None:
        # (b, l, r, blocks): each block of columns has its own sum.
        da += out * blocks + block
        states += (batch * tl.cdiv(L, 16) * R + matrix_row) * C
    if sequence is not None:
        # The states of a packed sequence are found from its number.
        sequence += origin
        h0 += matrix_row * C
        if dh is not None:
            dh += matrix_row * C
        if dh0 is not None:
            dh0 += matrix_row * C

    g = zeros(x, columns)
    product = tl.full((BD,), 1.0, tl.float32)
    if not SUMMARY:
        if dh is not None and sequence is None:
            g = tl.load(dh + state_row + columns, mask=inside, other=0.0).to(tl.float32)
        if products is not None:
            g = enter_segment(
                g, products + summary_row, totals + summary_row, sequence, segment, segments, direction, length, L,
                columns, C, BD, True,
            )  # fmt: skip
    if whole < end:
        g, product = _tile(
            x, log_a, dy, h0, sequence, states, dx, da, dh, dh0, g, product,
            direction * x_time, direction * a_time, direction * dy_time, direction * R * blocks, direction,
            whole, L, columns, R, C, SUMMARY, BD, EVEN, False,
        )  # fmt: skip
    for done in tl.range(0, whole - begin, 16, num_stages=STAGES):
        g, product = _tile(
            x, log_a, dy, h0, sequence, states, dx, da, dh, dh0, g, product,
            direction * x_time, direction * a_time, direction * dy_time, direction * R * blocks, direction,
            whole - 16 - done, L, columns, R, C, SUMMARY, BD, EVEN, True,
        )  # fmt: skip

    if SUMMARY:
        row = summary_row + segment.to(tl.int64) * C + columns
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, g, mask=inside)
    elif dh0 is not None and sequence is None:
        tl.store(dh0 + state_row + columns, g, mask=inside & (begin == 0))


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, log_a, h0, sequence = inputs
    (reverse,) = options
    batch, l, r, c = x.shape
    dx, dlog_a = room((x, log_a), needs)
    dh0 = state_room(h0, dh, needs[2], passes=sequence is not None or l == 0)
    if x.numel() == 0:
        return [dx, dlog_a if dlog_a is None else dlog_a.zero_(), dh0]
    BD, warps, stages = config(x.dtype.itemsize, c, sequence is not None)
    blocks, length, segments = cover(batch * r, l, c, BD, warps)
    # Each block of columns has its part.
    da = dlog_a
    if dlog_a is not None and blocks > 1:
        da = log_a.new_empty(batch, l, r, blocks, dtype=torch.float32)
    x, decay, dy = channels_last(x), log_a.float(), channels_last(dy)
    h0, dh = (t if t is None else t.contiguous() for t in (h0, dh))
    strides = (*x.stride()[:3], *decay.stride(), *dy.stride()[:3])
    integers = (l, r, c, length, segments, blocks, -1 if reverse else 1, *strides)
    launch(
        matrix_scan_backward, batch * r, c, blocks, segments, x, (decay, dy, h0, sequence, dh), (states, dx, da, dh0),
        integers, (BD, c % BD == 0, stages), warps,
    )  # fmt: skip
    if da is not None and da is not dlog_a:
        # A plain sum adds in the same order every time.
        dlog_a = da.sum(-1)
    return [dx, dlog_a, dh0]
