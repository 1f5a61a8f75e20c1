"""The forward tile-walk of rg_lru, and its launcher: gates, decay, square root and scan in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp, sigmoid, softplus
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import (
    ROWS,
    batch_and_time,
    bits,
    channels_last,
    cover,
    edges,
    enter_bands,
    enter_segment,
    gather_states,
    launch,
    load_rows,
    store_rows,
)
from ssmscan.ops.rg_lru.autograd import Inputs, Options
from ssmscan.ops.rg_lru.configs import FORWARD


@triton.jit
def open_gate_rate(a_param, channels, D):
    """How fast the state of each channel decays while its gate is open."""
    return 8.0 * softplus(tl.load(a_param + channels, mask=channels < D, other=0.0).to(tl.float32))


@triton.jit
def decay_and_gain(gate, rate):
    """a = exp(-rate·gate), √(1 − a²), and the inverse of that, at most 1e15."""
    s = rate * gate
    a = exp(-s)
    # Where a is near 1, 1 − a² is summed from the series of 1 − exp(-2s).
    series = s * (2.0 - s * (2.0 - s * (4 / 3 - s * (2 / 3 - s * (4 / 15)))))
    square = tl.where(s < 0.0625, series, 1.0 - a * a)
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    return a, square * inverse, inverse


@triton.jit
def _tile(
    x, input_gate, recurrence_gate, rate, h0, sequence, y, hn, states, h, product,
    x_step, i_step, r_step, direction, t, L, channels, lanes, D,
    SCALE_FIRST: tl.constexpr, SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk the 32 steps from position t, which all exist if WHOLE. A SUMMARY writes nothing but tracks a's product."""
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 32).to(tl.int64)
    exists = t + row < L
    xs = load_rows(x + t * x_step, row * x_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    gis = load_rows(input_gate + t * i_step, row * i_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    # A closed gate keeps the state.
    grs = load_rows(
        recurrence_gate + t * r_step, row * r_step, exists, channels, D, float("-inf"), BD, EVEN, WHOLE
    )  # fmt: skip
    band = tl.arange(0, 2 * BD) // BD
    first = None
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64)
        starts = edges(sequence, t, row, direction, L, False)
        first = bits(starts)
        here = first >> (16 * band)
        initial = gather_states(h0, owner, starts, first, channels, D, BD)
    # Each band walks from the state 0, which tells what it makes of the one that enters it.
    decays = ()
    inputs = ()
    band_product = tl.full((2 * BD,), 1.0, tl.float32)
    total = tl.zeros((2 * BD,), tl.float32)
    for i in tl.static_range(16):
        if sequence is not None:
            started = (here >> i) & 1 != 0
            total = tl.where(started, initial[i].to(tl.float32), total)
        a, gain, _ = decay_and_gain(sigmoid(grs[i].to(tl.float32)), rate)
        if not SCALE_FIRST:
            if sequence is not None:
                gain = tl.where(started, 1.0, gain)
            elif i == 0:
                gain = tl.where(t + 16 * band == 0, 1.0, gain)
        u = gain * (sigmoid(gis[i].to(tl.float32)) * xs[i].to(tl.float32))
        total = tl.fma(a, total, u)
        band_product *= a
        decays = decays + (a,)
        inputs = inputs + (u,)
    state, h, product = enter_bands(h, product, band_product, total, first, BD)
    if states is not None:
        tl.store(states + (t // 16 + band) * D + lanes, state, mask=(lanes < D) & (t + 16 * band < L))
    if not SUMMARY:
        hs = ()
        for i in tl.static_range(16):
            if sequence is not None:
                state = tl.where((here >> i) & 1 != 0, initial[i].to(tl.float32), state)
            state = tl.fma(decays[i], state, inputs[i])
            hs = hs + (state,)
        step = direction * D
        store_rows(y + t * step, row * step, exists, hs, channels, D, BD, EVEN, WHOLE)
        if sequence is not None:
            ends = edges(sequence, t, row, direction, L, True)
            if bits(ends) != 0:
                store_rows(hn, owner * D, ends, hs, channels, D, BD, False, False)
    return h, product


@kernel(do_not_specialize=["L", "blocks", "length", "segments", "direction"])
def rg_lru_forward(
    # read
    x, input_gate, recurrence_gate, a_param, h0, sequence,
    # written
    y, hn, states,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, D, blocks, length, segments, direction,
    # strides
    x_batch, x_time, i_batch, i_time, r_batch, r_time,
    # constants
    SUMMARY: tl.constexpr, SCALE_FIRST: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The recurrence over one segment of the sequence, or its SUMMARY: a's product and the state from 0."""
    # The batch may exceed what the other axes of a grid can count.
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    # The channels of both bands' lanes.
    lanes = tl.program_id(0) % blocks * BD + tl.arange(0, 2 * BD) % BD
    inside = channels < D
    segment = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = segment * length
    end = min(begin + length, L)
    whole = begin + (end - begin) // 32 * 32
    summary_row = batch * segments * D

    # Positions count in scan order; a reversed scan starts at the last token and takes negative steps.
    origin = tl.where(direction < 0, L - 1, 0).to(tl.int64)
    x += batch * x_batch + origin * x_time
    input_gate += batch * i_batch + origin * i_time
    recurrence_gate += batch * r_batch + origin * r_time
    if sequence is not None:
        sequence += origin
    if not SUMMARY:
        y += (batch * L + origin) * D
    if states is not None:
        states += batch * tl.cdiv(L, 16) * D

    rate = open_gate_rate(a_param, lanes, D)
    h = tl.zeros((BD,), tl.float32)
    product = tl.full((BD,), 1.0, tl.float32)
    if not SUMMARY:
        if h0 is not None and sequence is None:
            h = tl.load(h0 + batch * D + channels, mask=inside, other=0.0).to(tl.float32)
        if products is not None:
            h = enter_segment(
                h, products + summary_row, totals + summary_row, sequence, segment, segments, direction, length, L,
                channels, D, BD, False,
            )  # fmt: skip
    for t in tl.range(begin, whole, 32, num_stages=STAGES):
        h, product = _tile(
            x, input_gate, recurrence_gate, rate, h0, sequence, y, hn, states, h, product,
            direction * x_time, direction * i_time, direction * r_time, direction,
            t, L, channels, lanes, D, SCALE_FIRST, SUMMARY, BD, EVEN, True,
        )  # fmt: skip
    if whole < end:
        h, product = _tile(
            x, input_gate, recurrence_gate, rate, h0, sequence, y, hn, states, h, product,
            direction * x_time, direction * i_time, direction * r_time, direction,
            whole, L, channels, lanes, D, SCALE_FIRST, SUMMARY, BD, EVEN, False,
        )  # fmt: skip

    if SUMMARY:
        row = summary_row + segment.to(tl.int64) * D + channels
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, h, mask=inside)
    elif sequence is None:
        tl.store(hn + batch * D + channels, h, mask=inside & (end == L))


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state, and with ``save`` the state before every 16th step."""
    x, input_gate, recurrence_gate, a_param, h0, sequence = inputs
    reverse, scale_first = options
    batch, l, d = x.shape
    y = x.new_empty(batch, l, d)
    # Packed: an empty sequence keeps its initial state, the kernel writes the others.
    hn = x.new_empty(batch, d, dtype=torch.float32) if sequence is None else h0.to(torch.float32, copy=True)
    states = x.new_empty(batch, -(-l // ROWS), d, dtype=torch.float32) if save else None
    if batch * d == 0:
        return y, hn, states
    x, input_gate, recurrence_gate = channels_last(x), channels_last(input_gate), channels_last(recurrence_gate)
    a_param = a_param.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    config = FORWARD[x.dtype.itemsize]
    # The warps of both bands walk the same channels.
    blocks, length, segments = cover(batch, l, d, config.BD, config.warps // 2, 2 * ROWS)
    strides = batch_and_time(x, input_gate, recurrence_gate)
    integers = (l, d, blocks, length, segments, -1 if reverse else 1, *strides)
    launch(
        rg_lru_forward, batch, d, blocks, segments, x, (input_gate, recurrence_gate, a_param, h0, sequence),
        (y, hn, states), integers, (scale_first, config.BD, d % config.BD == 0, config.stages), config.warps,
    )  # fmt: skip
    return y, hn, states
