"""What the forward and the backward kernels share: tiles of steps, their rows, and the functions of one step.

The state is a tile [N, BD]. A program of few states keeps all of a channel in the registers of one lane, so that the
sum over them needs no other lane, and reads a row of B or C as one broadcast from shared memory. The compiler takes
that layout from the loads of A; see :func:`load_states`.
"""

import triton
import triton.language as tl

from ssmscan.ops._triton.activation import softplus
from ssmscan.ops._triton.walk import glue, halves

LN2 = tl.constexpr(0.6931471805599453)
# layout: of axes that are equally contiguous Triton lays neighbours in the first one over neighbouring lanes before
# 3.7, and in the last one from then on.
FIRST_OVER_LANES = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def _columns4(tile, W: tl.constexpr):
    left, right = halves(tile, W, 4)
    a, b = tl.split(left)
    c, d = tl.split(right)
    return (a, b, c, d)


@triton.jit
def rows(tile):
    """The rows of a [8, W] tile, in order."""
    W: tl.constexpr = tile.shape[1]
    left, right = halves(tl.trans(tile), W, 8)
    return _columns4(left, W) + _columns4(right, W)


@triton.jit
def stack(r):
    """The [8, W] tile of 8 rows, a tuple in order."""
    W: tl.constexpr = r[0].shape[0]
    left = glue(tl.join(r[0], r[1]), tl.join(r[2], r[3]), W, 4)
    right = glue(tl.join(r[4], r[5]), tl.join(r[6], r[7]), W, 4)
    return tl.trans(glue(left, right, W, 8))


@triton.jit
def load_rows(pointer, offset, exists, columns, inside):
    """The rows at ``pointer + offset`` of some columns, 0 where not ``exists`` and not ``inside``."""
    mask = exists[:, None] & inside[None, :]
    return rows(tl.load(pointer + (offset[:, None] + columns[None, :]), mask=mask, other=0.0))


@triton.jit
def store_rows(pointer, offset, exists, columns, inside, values):
    """Store a tuple of rows where :func:`load_rows` with the same arguments would load them."""
    tile = stack(values).to(pointer.dtype.element_ty)
    mask = exists[:, None] & inside[None, :]
    tl.store(pointer + (offset[:, None] + columns[None, :]), tile, mask=mask)


@triton.jit
def vary(one, t):
    """``one``, but to the compiler another number for each position t."""
    return one + tl.minimum(t, 0).to(tl.int32)


@triton.jit
def turned(tile):
    """Between a tile whose last axis is to lie over the lanes, and the one to load or store: the same, or reversed."""
    if FIRST_OVER_LANES:
        tile = tl.trans(tile) if len(tile.shape) == 2 else tl.permute(tile, (2, 1, 0))
    return tile


@triton.jit
def load_states(pointer, channels, inside, channel_step, states, state_step, n):
    """A [N, BD] tile of something that each channel and state has, 0 outside.

    The steps are numbers that the compiler must not know: else it would load several neighbours in a lane, and from
    there spread the states or channels of the whole kernel over lanes in that way. In a loop they must vary, as far as
    it knows (see :func:`vary`): else it would keep the addresses in registers.
    """
    offsets = turned(channels[None, :] * channel_step + states[:, None] * state_step)
    mask = turned(inside[None, :] & (states < n)[:, None])
    return turned(tl.load(pointer + offsets, mask=mask, other=0.0)).to(tl.float32)


@triton.jit
def store_states(pointer, channels, inside, channel_step, states, state_step, n, tile):
    """Store what :func:`load_states` would load."""
    offsets = turned(channels[None, :] * channel_step + states[:, None] * state_step)
    tl.store(pointer + offsets, turned(tile), mask=turned(inside[None, :] & (states < n)[:, None]))


@triton.jit
def in_run(position, low, high, PACKED: tl.constexpr):
    """Whether a position is in the run; unless PACKED, runs begin with a tile."""
    return (position >= low) & (position < high) if PACKED else position < high


@triton.jit
def step_sizes(dts, bias, t, low, high, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr):
    """The step sizes of 8 tokens; one that is not in the run has a step of 0, which leaves the state as it is."""
    deltas = ()
    for i in tl.static_range(8):
        v = dts[i].to(tl.float32) + bias
        delta = softplus(v) if SOFTPLUS else v
        delta = tl.where(in_run(t + i, low, high, PACKED), delta, 0.0)
        deltas = deltas + (delta,)  # type: ignore[assignment]
    return deltas
