"""The backward tile-walk of rg_lru, and its launcher: every gradient in one pass against the scan order.

With g_t the gradient of h_t, in which the returned state's dh and all later steps are included, i and r the open gates,
s = √(1 − a²) and rate = 8·softplus(Λ):

    g_t = dy_t + a_{t+1}·g_{t+1},    dx = g·s·i,    d(input gate) = g·s·x·i·(1 − i)
    d(log a) = g·(a·h_{t-1} − x·i·a²/s),    d(recurrence gate) = −rate·d(log a)·r·(1 − r)
    dΛ = −8·σ(Λ)·Σ d(log a)·r

1/s is bounded by 1000. Each program sums its part of dΛ; the parts are added after it in a fixed order. The states of
16 steps are recomputed in registers from the one that the forward saved before them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.gradients import room, state_room, sum_rows
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
)
from ssmscan.ops.rg_lru.autograd import Inputs, Options
from ssmscan.ops.rg_lru.configs import BACKWARD
from ssmscan.ops.rg_lru.kernel_fwd import decay_and_gain, open_gate_rate


@triton.jit
def _tile(
    x, input_gate, recurrence_gate, rate, dy, h0, sequence, states, dx, di, dr, dh, dh0, g, product, slope,
    x_step, i_step, r_step, dy_step, direction, t, L, channels, D,
    SCALE_FIRST: tl.constexpr, SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk back over the 16 steps from position t, which all exist if WHOLE.

    A SUMMARY tracks g and a's product; the walk itself adds Σ d(log a)·r to ``slope``.
    """
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 16).to(tl.int64)
    exists = t + row < L
    # A closed gate keeps the state.
    grs = load_rows(
        recurrence_gate + t * r_step, row * r_step, exists, channels, D, float("-inf"), BD, EVEN, WHOLE
    )  # fmt: skip
    dys = load_rows(dy + t * dy_step, row * dy_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64)
        starts = edges(sequence, t, row, direction, L, False)
        ends = edges(sequence, t, row, direction, L, True)
        first = bits(starts)
        last = bits(ends)
        if dh is not None:
            final = gather_states(dh, owner, ends, last, channels, D, BD)
    # The open gates, the decay a, the gain √(1 − a²), and how fast that falls with log a, bounded: a²/gain. Unscaled, a
    # first token has the gain 1, which does not fall.
    rs = ()
    decays = ()
    gains = ()
    falls = ()
    for i in tl.static_range(16):
        r = sigmoid(grs[i].to(tl.float32))
        a, gain, inverse = decay_and_gain(r, rate)
        fall = a * a * tl.minimum(inverse, 1000.0)
        if not SCALE_FIRST and (sequence is not None or i == 0):
            unscaled = t == 0 if sequence is None else (first >> i) & 1 != 0
            gain = tl.where(unscaled, 1.0, gain)
            fall = tl.where(unscaled, 0.0, fall)
        rs = rs + (r,)
        decays = decays + (a,)
        gains = gains + (gain,)
        falls = falls + (fall,)
    if not SUMMARY:
        xs = load_rows(x + t * x_step, row * x_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
        gis = load_rows(input_gate + t * i_step, row * i_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
        if sequence is not None:
            entering = gather_states(h0, owner, starts, first, channels, D, BD)
        # The decayed states that each step adds to.
        h = tl.load(states + t // 16 * D + channels, mask=channels < D, other=0.0)
        opens = ()
        decayed = ()
        for i in tl.static_range(16):
            if sequence is not None:
                h = tl.where((first >> i) & 1 != 0, entering[i].to(tl.float32), h)
            h *= decays[i]
            decayed = decayed + (h,)
            opened = sigmoid(gis[i].to(tl.float32))
            opens = opens + (opened,)
            h += gains[i] * (opened * xs[i].to(tl.float32))
    # The walk goes backward, so the rows are gathered from the front.
    dxs = ()
    dis = ()
    drs = ()
    gs = ()
    total = tl.zeros((BD,), tl.float32)
    for i in tl.static_range(15, -1, -1):
        if sequence is not None:
            ended = (last >> i) & 1 != 0
            if dh is None:
                g = tl.where(ended, 0.0, g)
            else:
                g = tl.where(ended, final[i].to(tl.float32), g)
        g += dys[i].to(tl.float32)
        if not SUMMARY:
            v = xs[i].to(tl.float32)
            u = opens[i] * v
            du = g * gains[i] * opens[i]
            slowing = g * (decayed[i] - u * falls[i]) * rs[i]
            total += slowing
            if dx is not None:
                dxs = (du,) + dxs
            if di is not None:
                dis = (du * (v - u),) + dis
            if dr is not None:
                drs = (slowing * (rate * rs[i] - rate),) + drs
        g *= decays[i]
        gs = (g,) + gs
        product *= decays[i]
    step = direction * D
    if dx is not None:
        store_rows(dx + t * step, row * step, exists, dxs, channels, D, BD, EVEN, WHOLE)
    if di is not None:
        store_rows(di + t * step, row * step, exists, dis, channels, D, BD, EVEN, WHOLE)
    if dr is not None:
        store_rows(dr + t * step, row * step, exists, drs, channels, D, BD, EVEN, WHOLE)
    # Two conditions, not one: the first is settled at compile time.
    if dh0 is not None and sequence is not None:  # noqa: SIM102
        if first != 0:
            store_rows(dh0, owner * D, starts, gs, channels, D, BD, False, False)
    return g, product, slope + total


@kernel(do_not_specialize=["L", "blocks", "length", "segments", "direction"])
def rg_lru_backward(
    # read
    x, input_gate, recurrence_gate, a_param, dy, h0, sequence, dh, states,
    # written
    dx, di, dr, slopes, dh0,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, D, blocks, length, segments, direction,
    # strides
    x_batch, x_time, i_batch, i_time, r_batch, r_time, dy_batch, dy_time,
    # constants
    SUMMARY: tl.constexpr, SCALE_FIRST: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients over one segment of the sequence, or the SUMMARY of g over it; segments count against the scan."""
    # The batch may exceed what the other axes of a grid can count.
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
    input_gate += batch * i_batch + origin * i_time
    recurrence_gate += batch * r_batch + origin * r_time
    dy += batch * dy_batch + origin * dy_time
    out = (batch * L + origin) * D
    if sequence is not None:
        sequence += origin
    if dx is not None:
        dx += out
    if di is not None:
        di += out
    if dr is not None:
        dr += out
    if states is not None:
        states += batch * tl.cdiv(L, 16) * D

    rate = open_gate_rate(a_param, channels, D)
    g = tl.zeros((BD,), tl.float32)
    slope = tl.zeros((BD,), tl.float32)
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
        g, product, slope = _tile(
            x, input_gate, recurrence_gate, rate, dy, h0, sequence, states, dx, di, dr, dh, dh0, g, product, slope,
            direction * x_time, direction * i_time, direction * r_time, direction * dy_time, direction,
            whole, L, channels, D, SCALE_FIRST, SUMMARY, BD, EVEN, False,
        )  # fmt: skip
    for done in tl.range(0, whole - begin, 16, num_stages=STAGES):
        g, product, slope = _tile(
            x, input_gate, recurrence_gate, rate, dy, h0, sequence, states, dx, di, dr, dh, dh0, g, product, slope,
            direction * x_time, direction * i_time, direction * r_time, direction * dy_time, direction,
            whole - 16 - done, L, channels, D, SCALE_FIRST, SUMMARY, BD, EVEN, True,
        )  # fmt: skip

    row = summary_row + segment.to(tl.int64) * D + channels
    if SUMMARY:
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, g, mask=inside)
    elif dh0 is not None and sequence is None:
        tl.store(dh0 + batch * D + channels, g, mask=inside & (begin == 0))
    if slopes is not None:
        # From the slope of the decay's rate, 8·softplus(a_param), to that of a_param.
        opening = sigmoid(tl.load(a_param + channels, mask=inside, other=0.0).to(tl.float32))
        tl.store(slopes + row, -8.0 * opening * slope, mask=inside)


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, input_gate, recurrence_gate, a_param, h0, sequence = inputs
    reverse, scale_first = options
    batch, l, d = x.shape
    dx, di, dr, da_param = room(inputs[:4], needs)
    dh0 = state_room(h0, dh, needs[4], passes=sequence is not None or l == 0)
    if x.numel() == 0:
        return [dx, di, dr, da_param if da_param is None else da_param.zero_(), dh0]
    x, input_gate, recurrence_gate = channels_last(x), channels_last(input_gate), channels_last(recurrence_gate)
    dy, parameter = channels_last(dy), a_param.contiguous()
    h0, dh = (t if t is None else t.contiguous() for t in (h0, dh))
    config = BACKWARD[x.dtype.itemsize]
    blocks, length, segments = cover(batch, l, d, config.BD, config.warps)
    strides = batch_and_time(x, input_gate, recurrence_gate, dy)
    integers = (l, d, blocks, length, segments, -1 if reverse else 1, *strides)
    slopes = x.new_empty(batch, segments, d, dtype=torch.float32) if needs[3] else None
    launch(
        rg_lru_backward, batch, d, blocks, segments, x,
        (input_gate, recurrence_gate, parameter, dy, h0, sequence, dh), (states, dx, di, dr, slopes, dh0), integers,
        (scale_first, config.BD, d % config.BD == 0, config.stages), config.warps,
    )  # fmt: skip
    if slopes is not None:
        sum_rows(slopes.view(-1, d), (d, 0, 0), (da_param, None, None))
    return [dx, di, dr, da_param, dh0]
