"""The backward of causal_conv1d, and its launcher: every gradient in one pass against the scan order.

With z_t the value before the activation, dh the returned state's gradient and dy the output's:

    dz_t = dy_t·act'(z_t),    dweight_k = Σ dz_t·x_{t-(w-1)+k},    dbias = Σ dz_t,    dx_t = g_{w-2} + weight_{w-1}·dz_t

where g, w - 1 rows, is the gradient of the state after t from all later steps. It starts as dh and goes back over t by

    g <- (weight_0·dz_t, g_0 + weight_1·dz_t, ..., g_{w-3} + weight_{w-2}·dz_t)

So it depends on w - 1 steps only, and a segment that is not the last one begins that many positions behind its end.
z is computed again from x.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.gradients import room, state_room, sum_rows
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops._triton.window import cover, from_first, load_row, rows_before, sequence_of, store_row
from ssmscan.ops.causal_conv1d.autograd import Inputs, Options
from ssmscan.ops.causal_conv1d.configs import BACKWARD
from ssmscan.ops.causal_conv1d.kernel_fwd import load_taps


@triton.jit
def _tile(
    x, dy, h0, dx, taps, offset, g, sums, t, start, end, x_step, dy_step, dx_step, channels, D,
    W: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Walk back over the ROWS positions from t. A single one may lie behind the ``end`` and then only counts for g."""
    t = tl.cast(t, tl.int64)
    dys = ()
    for i in tl.static_range(ROWS):
        dys = dys + (load_row(dy + (t + i) * dy_step, True, channels, D, EVEN),)
    if SILU or SUMS:
        loaded = ()
        for i in tl.static_range(ROWS):
            loaded = loaded + (load_row(x + (t + i) * x_step, True, channels, D, EVEN),)
        inputs = rows_before(x, h0, t, start, x_step, channels, D, W - 1, EVEN) + loaded
    for i in tl.static_range(ROWS - 1, -1, -1):
        ours = True if ROWS > 1 else t < end
        dz = tl.cast(dys[i], tl.float32)
        if SILU:
            z = offset
            for k in tl.static_range(W):
                z += taps[k] * inputs[i + k].to(tl.float32)
            gate = sigmoid(z)
            dz *= gate * (1.0 + z * (1.0 - gate))
        if dx is not None:
            store_row(dx + (t + i) * dx_step, g[W - 2] + taps[W - 1] * dz, ours, channels, D, EVEN)
        if SUMS:
            longer = ()
            for k in tl.static_range(W):
                term = dz * inputs[i + k].to(tl.float32)
                longer = longer + (sums[k] + (term if ROWS > 1 else tl.where(ours, term, 0.0)),)
            sums = longer + (sums[W] + (dz if ROWS > 1 else tl.where(ours, dz, 0.0)),)
        older = (taps[0] * dz,)
        for k in tl.static_range(1, W - 1):
            older = older + (g[k - 1] + taps[k] * dz,)
        g = older
    return g, sums


@kernel(do_not_specialize=["L", "length", "segments", "items", "direction"])
def causal_conv1d_backward(
    # read
    x, dy, weight, bias, h0, sequence, bounds, dh,
    # written
    dx, partial, dh0,
    # sizes
    L, D, length, segments, items, direction,
    # strides
    x_batch, x_step, dy_batch, dy_step, dx_step,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx over some of the items (segments of all batch rows), dh0 of the sequences that start in them, and their parts
    of dweight and dbias."""
    blocks = tl.cdiv(D, BD)
    walker = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    SUMS: tl.constexpr = partial is not None

    taps, offset = load_taps(weight, bias, channels, D, W, BD)

    sums = ()
    for _k in tl.static_range(W + 1):
        sums = sums + (tl.zeros((BD,), tl.float32),)
    for item in tl.range(walker, items, tl.num_programs(0) // blocks):
        batch = tl.cast(item // segments, tl.int64)
        begin = tl.cast(item % segments, tl.int64) * length
        end = min(begin + length, L)
        xs = x + batch * x_batch
        dys = dy + batch * dy_batch
        dxs = None if dx is None else dx + batch * L * D
        # From the end of the segment, or of a sequence in it, back to the next start of one of them.
        while begin < end:
            if sequence is None:
                number = batch
                low = tl.cast(0, tl.int64)
                high = tl.cast(L, tl.int64)
            else:
                number, low, high = sequence_of(sequence, bounds, end - 1, L, direction)
            state = None if h0 is None else h0 + number * (W - 1) * D
            start = max(low, begin)
            whole = start + (end - start) // ROWS * ROWS
            g = ()
            for k in tl.static_range(W - 1):
                if dh is None:
                    g = g + (tl.zeros((BD,), tl.float32),)
                else:
                    row = load_row(dh + (number * (W - 1) + k) * D, True, channels, D, EVEN)
                    g = g + (row.to(tl.float32),)
            # What lies behind the end of the segment, and what is left of a tile.
            top = min(end + W - 1, high)
            for done in tl.range(0, top - whole, num_stages=4):
                g, sums = _tile(
                    xs, dys, state, dxs, taps, offset, g, sums, top - 1 - done, low, end, x_step, dy_step, dx_step,
                    channels, D, W, SILU, SUMS, 1, EVEN,
                )  # fmt: skip
            for done in tl.range(0, whole - start, ROWS, num_stages=STAGES):
                g, sums = _tile(
                    xs, dys, state, dxs, taps, offset, g, sums, whole - ROWS - done, low, end, x_step, dy_step, dx_step,
                    channels, D, W, SILU, SUMS, ROWS, EVEN,
                )  # fmt: skip
            # Two conditions, not one: the first is settled at compile time.
            if dh0 is not None:  # noqa: SIM102
                if start == low:
                    for k in tl.static_range(W - 1):
                        store_row(dh0 + (number * (W - 1) + k) * D, g[k], True, channels, D, EVEN)
            end = start
    if SUMS:
        row = partial + walker.to(tl.int64) * (W + 1) * D
        for k in tl.static_range(W + 1):
            store_row(row + k * D, sums[k], True, channels, D, EVEN)


def backward(
    inputs: Inputs, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, weight, bias, h0, sequence, bounds = inputs
    silu, reverse = options
    batch, l, d = x.shape
    w = weight.shape[1]
    dx, dweight, dbias = room((x, weight, bias), needs)
    dh0 = state_room(h0, dh, needs[3], passes=bounds is not None or l == 0)
    if x.numel() == 0:
        return [dx, *(t if t is None else t.zero_() for t in (dweight, dbias)), dh0]
    x, dy = channels_last(x), channels_last(dy)
    h0, dh, bias = (None if t is None else t.contiguous() for t in (h0, dh, bias))
    direction = -1 if reverse else 1
    config = BACKWARD[x.dtype.itemsize, w > 4]
    blocks, length, segments = cover(batch, l, d, config.BD, config.rows, config.programs)
    items = batch * segments
    walkers = min(items, max(config.programs // blocks, 1))
    parts = x.new_empty(walkers, (w + 1) * d, dtype=torch.float32) if needs[1] or needs[2] else None
    causal_conv1d_backward.launch(
        (blocks * walkers, 1, 1),
        (
            from_first(x, 1, reverse), from_first(dy, 1, reverse), weight.contiguous(), bias, h0,
            None if sequence is None else from_first(sequence, 0, reverse), bounds, dh,
            None if dx is None else from_first(dx, 1, reverse), parts, dh0,
        ),
        (
            l, d, length, segments, items, direction,
            x.stride(0), direction * x.stride(1), dy.stride(0), direction * dy.stride(1), direction * d,
        ),
        (w, silu, config.BD, config.rows, d % config.BD == 0, config.stages),
        config.warps,
        config.registers,
    )  # fmt: skip
    if parts is not None:
        sum_rows(parts, (w * d, d, 0), (dweight, dbias, None), transposed=w)
    return [dx, dweight, dbias, dh0]
