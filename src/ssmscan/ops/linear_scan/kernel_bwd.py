"""The backward tile-walk of linear_scan, and its launcher: every gradient in one pass against the scan order.

With g_t the gradient of h_t from all later steps, dh the returned state's and dy the output's:

    g_t = c_t·dy_t + a_{t+1}·g_{t+1},    dx = g·b,    db = g·x,    dc = dy·h,    da_t = g_t·h_{t-1}

The states of 16 steps are recomputed in registers from the one that the forward saved before them.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.gradients import room, state_room
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import (
    batch_and_time,
    bits,
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
from ssmscan.ops.linear_scan.autograd import Inputs, Options
from ssmscan.ops.linear_scan.configs import BACKWARD


@triton.jit
def _tile(
    x, a, b, c, dy, h0, sequence, states, dx, da, db, dc, dh, dh0, g, product,
    x_step, a_step, b_step, c_step, dy_step, direction, t, L, channels, D,
    LOG: tl.constexpr, SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk back over the 16 steps from position t, which all exist if WHOLE. A SUMMARY tracks g and a's product."""
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 16).to(tl.int64)
    exists = t + row < L
    decays = load_rows(a + t * a_step, row * a_step, exists, channels, D, 0.0 if LOG else 1.0, BD, EVEN, WHOLE)
    dys = load_rows(dy + t * dy_step, row * dy_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    if c is not None:
        cs = load_rows(c + t * c_step, row * c_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64)
        starts = edges(sequence, t, row, direction, L, False)
        ends = edges(sequence, t, row, direction, L, True)
        first = bits(starts)
        last = bits(ends)
        if dh is not None:
            final = gather_states(dh, owner, ends, last, channels, D, BD)
    if not SUMMARY:
        xs = load_rows(x + t * x_step, row * x_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
        if b is not None:
            bs = load_rows(b + t * b_step, row * b_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
        if sequence is not None:
            entering = gather_states(h0, owner, starts, first, channels, D, BD)
        # The states before and after each step.
        h = tl.load(states + t // 16 * D + channels, mask=channels < D, other=0.0)
        befores = ()
        afters = ()
        for i in tl.static_range(16):
            if sequence is not None:
                h = tl.where((first >> i) & 1 != 0, entering[i].to(tl.float32), h)
            befores = befores + (h,)
            decay = decays[i].to(tl.float32)
            if LOG:
                decay = tl.exp(decay)
            u = xs[i].to(tl.float32)
            if b is not None:
                u *= bs[i].to(tl.float32)
            h = tl.fma(decay, h, u)
            afters = afters + (h,)
    # The walk goes backward, so the rows are gathered from the front.
    dxs = ()
    das = ()
    dbs = ()
    dcs = ()
    gs = ()
    for i in tl.static_range(15, -1, -1):
        if sequence is not None:
            ended = (last >> i) & 1 != 0
            if dh is None:
                g = tl.where(ended, 0.0, g)
            else:
                g = tl.where(ended, final[i].to(tl.float32), g)
        decay = decays[i].to(tl.float32)
        if LOG:
            decay = tl.exp(decay)
        v = dys[i].to(tl.float32)
        if dc is not None:
            dcs = (v * afters[i],) + dcs
        if c is not None:
            g = tl.fma(v, cs[i].to(tl.float32), g)
        else:
            g += v
        if dx is not None:
            dxs = (g * bs[i].to(tl.float32) if b is not None else g,) + dxs
        if db is not None:
            dbs = (g * xs[i].to(tl.float32),) + dbs
        if da is not None:
            das = ((g * decay if LOG else g) * befores[i],) + das
        g *= decay
        gs = (g,) + gs
        product *= decay
    step = direction * D
    if dx is not None:
        store_rows(dx + t * step, row * step, exists, dxs, channels, D, BD, EVEN, WHOLE)
    if da is not None:
        store_rows(da + t * step, row * step, exists, das, channels, D, BD, EVEN, WHOLE)
    if db is not None:
        store_rows(db + t * step, row * step, exists, dbs, channels, D, BD, EVEN, WHOLE)
    if dc is not None:
        store_rows(dc + t * step, row * step, exists, dcs, channels, D, BD, EVEN, WHOLE)
    # Two conditions, not one: the first is settled at compile time.
    if dh0 is not None and sequence is not None:  # noqa: SIM102
        if first != 0:
            store_rows(dh0, owner * D, starts, gs, channels, D, BD, False, False)
    return g, product


@kernel(do_not_specialize=["L", "length", "segments", "direction"])
def linear_scan_backward(
    # read
    x, a, b, c, dy, h0, sequence, dh, states,
    # written
    dx, da, db, dc, dh0,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, D, length, segments, direction,
    # strides
    x_batch, x_time, a_batch, a_time, b_batch, b_time, c_batch, c_time, dy_batch, dy_time,
    # constants
    SUMMARY: tl.constexpr, LOG: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients over one segment of the sequence, or the SUMMARY of g over it; segments count against the scan."""
    # On the first axis, for the others end at 65535.
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = channels < D
    segment = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (segments - 1 - segment) * length
    end = min(begin + length, L)
    whole = begin + (end - begin) // 16 * 16
    summary_row = batch * segments * D

    origin = tl.where(direction < 0, L - 1, 0).to(tl.int64)
    x += batch * x_batch + origin * x_time
    a += batch * a_batch + origin * a_time
    dy += batch * dy_batch + origin * dy_time
    out = (batch * L + origin) * D
    if b is not None:
        b += batch * b_batch + origin * b_time
    if c is not None:
        c += batch * c_batch + origin * c_time
    if sequence is not None:
        sequence += origin
    if dx is not None:
        dx += out
    if da is not None:
        da += out
    if db is not None:
        db += out
    if dc is not None:
        dc += out

    if states is not None:
        states += batch * tl.cdiv(L, 16) * D

    g = zeros(x, channels)
    product = tl.full((BD,), 1.0, tl.float32)
    if not SUMMARY:
        if dh is not None and sequence is None:
            g = tl.load(dh + batch * D + channels, mask=inside, other=0.0).to(tl.float32)
        if products is not None:
            g = enter_segment(
                g, products + summary_row, totals + summary_row, sequence, segment, segments, direction, length, L,
                channels, D, BD, True,
            )  # fmt: skip
    if whole < end:
        g, product = _tile(
            x, a, b, c, dy, h0, sequence, states, dx, da, db, dc, dh, dh0, g, product,
            direction * x_time, direction * a_time, direction * b_time, direction * c_time, direction * dy_time,
            direction, whole, L, channels, D, LOG, SUMMARY, BD, EVEN, False,
        )  # fmt: skip
    for done in tl.range(0, whole - begin, 16, num_stages=STAGES):
        g, product = _tile(
            x, a, b, c, dy, h0, sequence, states, dx, da, db, dc, dh, dh0, g, product,
            direction * x_time, direction * a_time, direction * b_time, direction * c_time, direction * dy_time,
            direction, whole - 16 - done, L, channels, D, LOG, SUMMARY, BD, EVEN, True,
        )  # fmt: skip

    if SUMMARY:
        row = summary_row + segment.to(tl.int64) * D + channels
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, g, mask=inside)
    elif dh0 is not None and sequence is None:
        tl.store(dh0 + batch * D + channels, g, mask=inside & (begin == 0))


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, decay, b, c, h0, sequence = inputs
    log, reverse = options
    batch, l, d = x.shape
    dx, da, db, dc = room((x, decay, b, c), needs)
    dh0 = state_room(h0, dh, needs[4], passes=sequence is not None or l == 0)
    if x.numel() == 0:
        return [dx, da, db, dc, dh0]
    x, decay, dy = channels_last(x), channels_last(decay), channels_last(dy)
    b, c = channels_last(b), channels_last(c)
    h0, dh = (t if t is None else t.contiguous() for t in (h0, dh))
    config = BACKWARD[x.dtype.itemsize]
    blocks, length, segments = cover(batch, l, d, config.BD, config.warps)
    integers = (l, d, length, segments, -1 if reverse else 1, *batch_and_time(x, decay, b, c, dy))
    launch(
        linear_scan_backward, batch, d, blocks, segments, x, (decay, b, c, dy, h0, sequence, dh),
        (states, dx, da, db, dc, dh0), integers, (log, config.BD, d % config.BD == 0, config.stages), config.warps,
    )  # fmt: skip
    return [dx, da, db, dc, dh0]
