"""The forward tile-walk of matrix_scan, and its launcher.

A program walks the sequence for one row of the state, or BD of its columns. A row's decay is one number per step: of a
tile's decays each thread loads one, and passes it on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import (
    ROWS,
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
from ssmscan.ops.matrix_scan.autograd import Inputs, Options
from ssmscan.ops.matrix_scan.configs import config


@triton.jit
def load_decays(log_a, offset, exists, BD: tl.constexpr, WHOLE: tl.constexpr):
    """The decays of 16 steps, each for BD columns; 1 where a step does not exist."""
    if WHOLE:
        logs = tl.load(log_a + offset)
    else:
        logs = tl.load(log_a + offset, mask=exists, other=0.0)
    each = exp(logs)
    decays = ()
    for i in tl.static_range(16):
        decays = decays + (tl.gather(each, tl.full((BD,), i, tl.int32), 0),)
    return decays


@triton.jit
def _tile(
    x, log_a, h0, sequence, y, hn, states, h, product, x_step, a_step, direction, t, L, columns, R, C,
    SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk the 16 steps from position t, which all exist if WHOLE. A SUMMARY writes nothing but tracks a's product."""
    t = tl.cast(t, tl.int64)
    row = tl.arange(0, 16).to(tl.int64)
    exists = t + row < L
    if states is not None:
        tl.store(states + t // 16 * R * C + columns, h, mask=columns < C)
    xs = load_rows(x + t * x_step, row * x_step, exists, columns, C, 0.0, BD, EVEN, WHOLE)
    decays = load_decays(log_a + t * a_step, row * a_step, exists, BD, WHOLE)
    if sequence is not None:
        owner = tl.load(sequence + (t + row) * direction, mask=exists, other=0).to(tl.int64) * R
        starts = edges(sequence, t, row, direction, L, False)
        first = bits(starts)
        entering = gather_states(h0, owner, starts, first, columns, C, BD)
    hs = ()
    for i in tl.static_range(16):
        if sequence is not None:
            h = tl.where((first >> i) & 1 != 0, entering[i].to(tl.float32), h)
        h = decays[i] * h + xs[i].to(tl.float32)
        product *= decays[i]
        hs = hs + (h,)
    if not SUMMARY:
        step = direction * R * C
        store_rows(y + t * step, row * step, exists, hs, columns, C, BD, EVEN, WHOLE)
        if sequence is not None:
            ends = edges(sequence, t, row, direction, L, True)
            if bits(ends) != 0:
                store_rows(hn, owner * C, ends, hs, columns, C, BD, False, False)
    return h, product


@kernel(do_not_specialize=["L", "length", "segments", "blocks", "direction"])
def matrix_scan_forward(
    # read
    x, log_a, h0, sequence,
    # written
    y, hn, states,
    # written by a SUMMARY, else read
    products, totals,
    # sizes
    L, R, C, length, segments, blocks, direction,
    # strides
    x_batch, x_time, x_row, a_batch, a_time, a_row,
    # constants
    SUMMARY: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """H = exp(log_a)·H + X over one segment of the sequence, or its SUMMARY: a's product and the state from 0."""
    walker = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = columns < C
    batch = (walker // R).to(tl.int64)
    matrix_row = (walker % R).to(tl.int64)
    segment = tl.program_id(1)
    begin = segment * length
    end = min(begin + length, L)
    whole = begin + (end - begin) // 16 * 16
    summary_row = walker.to(tl.int64) * segments * C

    # Positions count in scan order; a reversed scan starts at the last token and takes negative steps.
    origin = tl.where(direction < 0, L - 1, 0).to(tl.int64)
    x += batch * x_batch + matrix_row * x_row + origin * x_time
    log_a += batch * a_batch + matrix_row * a_row + origin * a_time
    if sequence is not None:
        # The states of a packed sequence are found from its number.
        sequence += origin
        h0 += matrix_row * C
    if not SUMMARY:
        y += ((batch * L + origin) * R + matrix_row) * C
        hn += matrix_row * C
    if states is not None:
        states += (batch * tl.cdiv(L, 16) * R + matrix_row) * C

    h = zeros(x, columns)
    product = tl.full((BD,), 1.0, tl.float32)
    if not SUMMARY:
        if h0 is not None and sequence is None:
            h = tl.load(h0 + (batch * R + matrix_row) * C + columns, mask=inside, other=0.0).to(tl.float32)
        if products is not None:
            h = enter_segment(
                h, products + summary_row, totals + summary_row, sequence, segment, segments, direction, length, L,
                columns, C, BD, False,
            )  # fmt: skip
    for t in tl.range(begin, whole, 16, num_stages=STAGES):
        h, product = _tile(
            x, log_a, h0, sequence, y, hn, states, h, product, direction * x_time, direction * a_time, direction,
            t, L, columns, R, C, SUMMARY, BD, EVEN, True,
        )  # fmt: skip
    if whole < end:
        h, product = _tile(
            x, log_a, h0, sequence, y, hn, states, h, product, direction * x_time, direction * a_time, direction,
            whole, L, columns, R, C, SUMMARY, BD, EVEN, False,
        )  # fmt: skip

    if SUMMARY:
        row = summary_row + segment.to(tl.int64) * C + columns
        tl.store(products + row, product, mask=inside)
        tl.store(totals + row, h, mask=inside)
    elif sequence is None:
        tl.store(hn + batch * R * C + columns, h, mask=inside & (end == L))


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state, and with ``save`` the state before every 16th step."""
    x, log_a, h0, sequence = inputs
    (reverse,) = options
    batch, l, r, c = x.shape
    y = x.new_empty(batch, l, r, c)
    # Packed: an empty sequence keeps its initial state, the kernel writes the others.
    hn = x.new_empty(batch, r, c, dtype=torch.float32) if sequence is None else h0.to(torch.float32, copy=True)
    states = x.new_empty(batch, -(-l // ROWS), r, c, dtype=torch.float32) if save else None
    if batch * r * c == 0:
        return y, hn, states
    # Elements of four bytes can be loaded ahead, narrower ones that are not adjacent cannot.
    x, log_a = channels_last(x), log_a.float()
    h0 = None if h0 is None else h0.contiguous()
    BD, warps, stages = config(x.dtype.itemsize, c, sequence is not None)
    blocks, length, segments = cover(batch * r, l, c, BD, warps)
    integers = (l, r, c, length, segments, blocks, -1 if reverse else 1, *x.stride()[:3], *log_a.stride())
    launch(
        matrix_scan_forward, batch * r, c, blocks, segments, x, (log_a, h0, sequence), (y, hn, states), integers,
        (BD, c % BD == 0, stages), warps,
    )  # fmt: skip
    return y, hn, states
