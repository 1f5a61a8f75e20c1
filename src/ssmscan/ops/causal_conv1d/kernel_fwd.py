"""The forward of causal_conv1d, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops._triton.window import cover, from_first, load_row, rows_before, sequence_of, store_row
from ssmscan.ops.causal_conv1d.autograd import Inputs, Options
from ssmscan.ops.causal_conv1d.configs import FORWARD


@triton.jit
def load_taps(weight, bias, channels, D, W: tl.constexpr, BD: tl.constexpr):
    """The columns of the weight as a tuple, and the bias."""
    inside = channels < D
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + channels * W + k, mask=inside, other=0.0).to(tl.float32),)
    offset = tl.zeros((BD,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def _tile(
    x, y, before, taps, offset, t, x_step, y_step, channels, D,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The outputs of ROWS positions from t; ``before`` are the W - 1 inputs before them. Returns the last W - 1."""
    t = tl.cast(t, tl.int64)
    inputs = before
    for i in tl.static_range(ROWS):
        inputs = inputs + (load_row(x + (t + i) * x_step, True, channels, D, EVEN),)
    for i in tl.static_range(ROWS):
        z = offset
        for k in tl.static_range(W):
            z += taps[k] * inputs[i + k].to(tl.float32)
        if SILU:
            z *= sigmoid(z)
        store_row(y + (t + i) * y_step, z, True, channels, D, EVEN)
    last = ()
    for k in tl.static_range(W - 1):
        last = last + (inputs[ROWS + k].to(tl.float32),)
    return last


@kernel(do_not_specialize=["L", "length", "segments", "direction"])
def causal_conv1d_forward(
    # read
    x, weight, bias, h0, sequence, bounds,
    # written
    y, hn,
    # sizes and strides
    L, D, length, segments, direction, x_batch, x_step, y_step,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y over one segment of the sequence, and the state of each sequence that ends there."""
    blocks = tl.cdiv(D, BD)
    program = tl.program_id(0)
    channels = program % blocks * BD + tl.arange(0, BD)
    segment = program // blocks % segments
    batch = (program // blocks // segments).to(tl.int64)
    begin = segment.to(tl.int64) * length
    end = min(begin + length, L)

    x += batch * x_batch
    y += batch * L * D
    taps, offset = load_taps(weight, bias, channels, D, W, BD)

    # From the start of the segment, or of a sequence in it, to the next end of one of them.
    while begin < end:
        if sequence is None:
            number = batch
            low = tl.cast(0, tl.int64)
            high = tl.cast(L, tl.int64)
        else:
            number, low, high = sequence_of(sequence, bounds, begin, L, direction)
        state = None if h0 is None else h0 + number * (W - 1) * D
        stop = min(high, end)
        whole = begin + (stop - begin) // ROWS * ROWS
        before = rows_before(x, state, begin, low, x_step, channels, D, W - 1, EVEN)
        for t in tl.range(begin, whole, ROWS, num_stages=STAGES):
            before = _tile(x, y, before, taps, offset, t, x_step, y_step, channels, D, W, SILU, ROWS, EVEN)
        for t in tl.range(whole, stop, num_stages=4):
            before = _tile(x, y, before, taps, offset, t, x_step, y_step, channels, D, W, SILU, 1, EVEN)
        if stop == high:
            for k in tl.static_range(W - 1):
                store_row(hn + (number * (W - 1) + k) * D, before[k], True, channels, D, EVEN)
        begin = stop


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    x, weight, bias, h0, sequence, bounds = inputs
    silu, reverse = options
    batch, l, d = x.shape
    w = weight.shape[1]
    y = x.new_empty(batch, l, d)
    hn = x.new_empty(batch if bounds is None else bounds.shape[0] - 1, w - 1, d, dtype=torch.float32)
    # The kernel writes the states of sequences that have a token.
    if bounds is not None or l == 0:
        hn.zero_() if h0 is None else hn.copy_(h0)
    if x.numel() == 0:
        return y, hn
    x, h0 = channels_last(x), None if h0 is None else h0.contiguous()
    direction = -1 if reverse else 1
    config = FORWARD[x.dtype.itemsize]
    blocks, length, segments = cover(batch, l, d, config.BD, config.rows, config.programs)
    causal_conv1d_forward.launch(
        (blocks * segments * batch, 1, 1),
        (
            from_first(x, 1, reverse), weight.contiguous(), None if bias is None else bias.contiguous(), h0,
            None if sequence is None else from_first(sequence, 0, reverse), bounds, from_first(y, 1, reverse), hn,
        ),
        (l, d, length, segments, direction, x.stride(0), direction * x.stride(1), direction * d),
        (w, silu, config.BD, config.rows, d % config.BD == 0, config.stages),
        config.warps,
        config.registers,
    )  # fmt: skip
    return y, hn
