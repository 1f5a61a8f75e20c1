"""The forward tile-walk of linear_scan, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import (
    ROWS,
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
from ssmscan.ops.linear_scan.configs import forward_config


@triton.jit
def _tile(
    x, a, b, c, h0, sequence, y, hn, states, h, product,
    x_step, a_step, b_step, c_step, direction, t, L, channels, D,
    LOG: tl.constexpr, SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk the 16 steps from position t, which all exist if WHOLE. A SUMMARY writes nothing but tracks a's product."""
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 16).to(tl.int64)
    exists = t + row < L
    if states is not None:
        tl.store(states + t // 16 * D + channels, h, mask=channels < D)
    xs = load_rows(x + t * x_step, row * x_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    decays = load_rows(a + t * a_step, row * a_step, exists, channels, D, 0.0 if LOG else 1.0, BD, EVEN, WHOLE)
    if b is not None:
        bs = load_rows(b + t * b_step, row * b_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    if c is not None:
        cs = load_rows(c + t * c_step, row * c_step, exists, channels, D, 0.0, BD, EVEN, WHOLE)
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64)
        starts = edges(sequence, t, row, direction, L, False)
        first = bits(starts)
        entering = gather_states(h0, owner, starts, first, channels, D, BD)
    hs = ()
    ys = ()
    for i in tl.static_range(16):
        if sequence is not None:
            h = tl.where((first >> i) & 1 != 0, entering[i].to(tl.float32), h)
        decay = decays[i].to(tl.float32)
        if LOG:
            decay = tl.exp(decay)
        u = xs[i].to(tl.float32)
        if b is not None:
            u *= bs[i].to(tl.float32)
        # Spelled out, so that every variant of the kernel rounds alike.
        h = tl.fma(decay, h, u)
        product *= decay
        out = h
        if c is not None:
            out *= cs[i].to(tl.float32)
        hs = hs + (h,)
        ys = ys + (out,)
    if not SUMMARY:
        step = direction * D
        store_rows(y + t * step, row * step, exists, ys, channels, D, BD, EVEN, WHOLE)
        if sequence is not None:
            ends = edges(sequence, t, row, direction, L, True)
            if bits(ends) != 0:
                store_rows(hn, owner * D, ends, hs, channels, D, BD, False, False)
    return h, product


@kernel(do_not_specialize=["L", "length", "segments", "direction"])
def linear_scan_forward(
    # read
    x, a, b, c, h0, sequence,
    # written
    y, hn, states,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, D, length, segments, direction,
    # strides
    x_batch, x_time, a_batch, a_time, b_batch, b_time, c_batch, c_time,
    # constants
    SUMMARY: tl.constexpr, LOG: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h = a·h + b·x, y = c·h over one segment of the sequence, or its SUMMARY: a's product and the state from 0."""
    # On the first axis, for the others end at 65535.
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = channels < D
    segment = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = segment * length
    end = min(begin + length, L)
    whole = begin + (end - begin) // 16 * 16
    summary_row = batch * segments * D

    # Positions count in scan order; a reversed scan starts at the last token and takes negative steps.
    origin = tl.where(direction < 0, L - 1, 0).to(tl.int64)
    x += batch * x_batch + origin * x_time
    a += batch * a_batch + origin * a_time
    if b is not None:
        b += batch * b_batch + origin * b_time
    if c is not None:
        c += batch * c_batch + origin * c_time
    if sequence is not None:
        sequence += origin
    if not SUMMARY:
        y += (batch * L + origin) * D
    if states is not None:
        states += batch * tl.cdiv(L, 16) * D

    h = zeros(x, channels)
    product = tl.full((BD,), 1.0, tl.float32)
    if not SUMMARY:
        if h0 is not None and sequence is None:
            h = tl.load(h0 + batch * D + channels, mask=inside, other=0.0).to(tl.float32)
        if products is not None:
            h = enter_segment(
                h, products + summary_row, totals + summary_row, sequence, segment, segments, direction, length, L,
                channels, D, BD, False,
            )  # fmt: skip
    for t in tl.range(begin, whole, 16, num_stages=STAGES):
        h, product = _tile(
            x, a, b, c, h0, sequence, y, hn, states, h, product,
            direction * x_time, direction * a_time, direction * b_time, direction * c_time, direction,
            t, L, channels, D, LOG, SUMMARY, BD, EVEN, True,
        )  # fmt: skip
    if whole < end:
        h, product = _tile(
            x, a, b, c, h0, sequence, y, hn, states, h, product,
            direction * x_time, direction * a_time, direction * b_time, direction * c_time, direction,
            whole, L, channels, D, LOG, SUMMARY, BD, EVEN, False,
        )  # fmt: skip

    if SUMMARY:
        row = summary_row + segment.to(tl.int64) * D + channels
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, h, mask=inside)
    elif sequence is None:
        tl.store(hn + batch * D + channels, h, mask=inside & (end == L))


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state, and with ``save`` the state before every 16th step."""
    x, decay, b, c, h0, sequence = inputs
    log, reverse = options
    batch, l, d = x.shape
    y = x.new_empty(batch, l, d)
    # Packed: an empty sequence keeps its initial state, the kernel writes the others.
    hn = x.new_empty(batch, d, dtype=torch.float32) if sequence is None else h0.to(torch.float32, copy=True)
    states = x.new_empty(batch, -(-l // ROWS), d, dtype=torch.float32) if save else None
    if batch * d == 0:
        return y, hn, states
    x, decay = channels_last(x), channels_last(decay)
    b, c = channels_last(b), channels_last(c)
    h0 = None if h0 is None else h0.contiguous()
    config = forward_config(x.dtype.itemsize, 2 + (b is not None) + (c is not None), batch, d)
    blocks, length, segments = cover(batch, l, d, config.BD, config.warps)
    integers = (l, d, length, segments, -1 if reverse else 1, *batch_and_time(x, decay, b, c))
    launch(
        linear_scan_forward, batch, d, blocks, segments, x, (decay, b, c, h0, sequence), (y, hn, states), integers,
        (log, config.BD, d % config.BD == 0, config.stages), config.warps,
    )  # fmt: skip
    return y, hn, states
