"""The tile-walk: one program walks the sequence for a batch row and BD channels, its state in registers.

It loads tiles of 16 steps by BD channels in a pipelined loop and takes them apart into rows, one register per channel
and thread: with BD = 32·warps no step needs a shuffle or a barrier. Positions are counted in scan order; a reversed
scan only starts at the other end and takes negative steps.

With too few walkers to fill the device the sequence is cut into segments. A first launch summarises each segment as
h -> P·h + S, and each walker composes the summaries of the segments before its own, always in the same order.

Where a step takes much arithmetic, one warp for 32 channels cannot issue it as fast as memory delivers. Then a tile has
two bands of 16 steps, laid side by side: 16 rows of 2·BD lanes, each band in warps of its own. A band is summarised as
a segment is, and the summaries are exchanged once a tile.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.cover import Cover
from ssmscan.ops._triton.launch import Kernel

# Steps in a band of a tile, and between two states that a forward keeps for its backward.
ROWS = 16
# Warps that keep a Hopper GPU busy: four for each multiprocessor, twice that when segments are so short that waiting
# for the first tiles counts.
WARPS = 528
SHORT_SEGMENT = 1024
# A shorter segment is not worth its summary.
SHORTEST_SEGMENT = 64


def cover(batch: int, l: int, d: int, BD: int, warps: int, rows: int = ROWS) -> Cover:
    """Segments long enough to be worth their summary, and enough of them to fill the device; a tile has ``rows``."""
    blocks = -(-d // BD)
    wanted = max(WARPS // (batch * blocks * warps), 1)
    if wanted > 1 and l < wanted * SHORT_SEGMENT:
        wanted = min(2 * wanted, max(l // SHORTEST_SEGMENT, 1))
    return Cover.of(blocks, l, wanted, rows)


def launch(
    kernel: Kernel,
    rows: int,
    columns: int,
    blocks: int,
    segments: int,
    x: Tensor,
    read: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: tuple[int, ...],
    warps: int,
) -> None:
    """Walk all segments, after a launch that summarises them if there are several.

    Args:
        kernel: takes ``x``, the tensors ``read`` and ``written``, products and totals, which are the summaries of all
            segments of ``rows`` sequences of ``columns`` channels; the integers, whether it is to summarise, and the
            constants.
        blocks: into how many the channels are cut.
    """
    products = totals = None
    if segments > 1:
        products, totals = x.new_empty(2, rows, segments, columns, dtype=torch.float32)
        # Nothing enters after the last segment, so it needs no summary.
        kernel.launch(
            (rows * blocks, segments - 1, 1),
            (x, *read, *(None for _ in written), products, totals),
            integers,
            (True, *constants),
            warps,
        )
    kernel.launch(
        (rows * blocks, segments, 1), (x, *read, *written, products, totals), integers, (False, *constants), warps
    )


def batch_and_time(*tensors: Tensor | None) -> tuple[int, ...]:
    """The strides of the first two axes of each tensor; zeros for one that is not given."""
    return tuple([s for t in tensors for s in ((0, 0) if t is None else t.stride()[:2])])


@overload
def channels_last(tensor: Tensor) -> Tensor: ...
@overload
def channels_last(tensor: Tensor | None) -> Tensor | None: ...
def channels_last(tensor: Tensor | None) -> Tensor | None:
    """The tensor with adjacent channels, copied where they are not: a tile is loaded in vectors along them."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def halves(tile, BD: tl.constexpr, N: tl.constexpr):
    """The first and last N/2 columns of a [BD, N] tile."""
    return tl.split(tl.permute(tl.reshape(tile, [BD, 2, N // 2]), (0, 2, 1)))


@triton.jit
def _columns8(tile, BD: tl.constexpr):
    left, right = halves(tile, BD, 8)
    a, b = halves(left, BD, 4)
    c, d = halves(right, BD, 4)
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    c0, c1 = tl.split(c)
    d0, d1 = tl.split(d)
    return (a0, a1, b0, b1, c0, c1, d0, d1)


@triton.jit
def rows(tile, BD: tl.constexpr):
    """The 16 rows of a [16, BD] tile, in order."""
    left, right = halves(tl.trans(tile), BD, 16)
    return _columns8(left, BD) + _columns8(right, BD)


@triton.jit
def load_rows(
    pointer, offset, exists, channels, D, OTHER: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr
):
    """16 rows at ``pointer + offset`` (int64, [16]) of BD channels; unless WHOLE, OTHER where not ``exists`` ([16]).

    With 32 offsets, the 16 rows of two bands: the channels of the first 16 beside those of the last.
    """
    BANDS: tl.constexpr = offset.shape[0] // 16
    pointers = pointer + (offset[:, None] + channels[None, :])
    if not WHOLE:
        tile = tl.load(pointers, mask=exists[:, None] & (channels < D)[None, :], other=OTHER)
    elif EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(channels < D)[None, :], other=OTHER)
    tile = tl.reshape(tl.permute(tl.reshape(tile, [BANDS, 16, BD]), (1, 0, 2)), [16, BANDS * BD])
    return rows(tile, BANDS * BD)


@triton.jit
def glue(left, right, BD: tl.constexpr, N: tl.constexpr):
    """The [BD, N] tile whose first and last N/2 columns are given."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [BD, N])


@triton.jit
def _glue8(r, FIRST: tl.constexpr, BD: tl.constexpr):
    left = glue(tl.join(r[FIRST], r[FIRST + 1]), tl.join(r[FIRST + 2], r[FIRST + 3]), BD, 4)
    right = glue(tl.join(r[FIRST + 4], r[FIRST + 5]), tl.join(r[FIRST + 6], r[FIRST + 7]), BD, 4)
    return glue(left, right, BD, 8)


@triton.jit
def store_rows(pointer, offset, exists, values, channels, D, BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    """Store 16 rows, a tuple in order, where :func:`load_rows` with the same arguments would load them."""
    BANDS: tl.constexpr = offset.shape[0] // 16
    pointers = pointer + (offset[:, None] + channels[None, :])
    tile = glue(_glue8(values, 0, BANDS * BD), _glue8(values, 8, BANDS * BD), BANDS * BD, 16)
    tile = tl.reshape(tl.permute(tl.reshape(tile, [BANDS, BD, 16]), (0, 2, 1)), [BANDS * 16, BD])
    tile = tile.to(pointer.dtype.element_ty)
    if not WHOLE:
        tl.store(pointers, tile, mask=exists[:, None] & (channels < D)[None, :])
    elif EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(channels < D)[None, :])


@triton.jit
def channel_sums(values, BD: tl.constexpr):
    """The sums over the channels of 16 rows, a tuple in order; [16]."""
    return tl.sum(glue(_glue8(values, 0, BD), _glue8(values, 8, BD), BD, 16), 0)


@triton.jit
def zeros(pointer, channels):
    """A row of zeros, [BD], read at ``pointer`` with a mask that is false.

    What is computed from a load has its layout. To rows that come from tl.zeros alone Triton 3.6 gives layouts in which
    each join of two of them (:func:`store_rows`) goes through shuffles or shared memory, 16 times a tile.
    """
    # layout: that of a load.
    return tl.load(pointer + channels, mask=channels < 0, other=0.0).to(tl.float32)


@triton.jit
def edges(sequence, t, row, step, L, LAST: tl.constexpr):
    """Which of the positions t + row are the first (LAST: the last) of their packed sequence, in scan order."""
    position = t + row
    here = tl.load(sequence + position * step, mask=position < L, other=-1)
    beyond = position + 1 if LAST else position - 1
    neighbour = tl.load(sequence + beyond * step, mask=(beyond >= 0) & (beyond < L), other=-1)
    # Nothing lies beyond the ends of the sequence, so there it changes.
    return (here != neighbour) & (position < L)


@triton.jit
def bits(flags):
    """At most 32 flags as the bits of one number."""
    return tl.sum(tl.where(flags, 1 << tl.arange(0, flags.shape[0]), 0), 0)


@triton.jit
def gather_states(states, owner, flags, flag_bits, channels, D, BD: tl.constexpr):
    """For each row of a tile, its sequence's state where flagged; most tiles have no flag, and load nothing."""
    if flag_bits != 0:
        found = load_rows(states, owner * D, flags, channels, D, 0.0, BD, False, False)
    else:
        z = tl.zeros((owner.shape[0] // 16 * BD,), states.dtype.element_ty)
        found = (z, z, z, z, z, z, z, z, z, z, z, z, z, z, z, z)
    return found


@triton.jit
def enter_bands(h, product, band_product, band_total, first, BD: tl.constexpr):
    """Chain the summaries h -> P·h + S of two bands: the state that enters each lane's; h and product after both.

    ``first`` has 16 bits for each band: where a packed sequence starts, nothing that enters leaves, not even NaN.
    """
    # layout: joined, they pass between the warps at once.
    pairs = tl.permute(tl.reshape(tl.join(band_product, band_total), [2, BD, 2]), (1, 2, 0))
    early, late = tl.split(pairs)
    early_product, early_total = tl.split(early)
    late_product, late_total = tl.split(late)
    if first is None:
        middle = tl.fma(early_product, h, early_total)
        last = tl.fma(late_product, middle, late_total)
    else:
        middle = tl.where(first & 0xFFFF != 0, 0.0, early_product * h) + early_total
        last = tl.where(first >> 16 != 0, 0.0, late_product * middle) + late_total
    entering = tl.reshape(tl.permute(tl.join(h, middle), (1, 0)), [2 * BD])
    return entering, last, product * early_product * late_product


@triton.jit
def enter_segment(
    h, product, total, sequence, segment, segments, direction, length, L, channels, D,
    BD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Compose the summaries of the segments walked before ``segment``; product and total name this batch row's first.

    A segment in which a packed sequence starts (walked backward: ends) forgets what enters it, whatever its product:
    0·NaN is not 0. Nor is 0·inf: the product of decays above 1 overflows where a state of zero still is one.
    """
    row = tl.arange(0, 16)
    for j in range(0, segment, 16):
        exists = j + row < segment
        offset = (j + row).to(tl.int64) * D
        products = load_rows(product, offset, exists, channels, D, 1.0, BD, False, False)
        totals = load_rows(total, offset, exists, channels, D, 0.0, BD, False, False)
        for i in tl.static_range(16):
            if sequence is None:
                h = tl.where(h == 0.0, totals[i], tl.fma(products[i], h, totals[i]))
            else:
                inside = j + i < segment
                if BACKWARD:
                    leaves = tl.cast(segments - 1 - j - i, tl.int64) * length
                    enters = leaves + length
                else:
                    enters = tl.cast(j + i, tl.int64) * length - 1
                    leaves = enters + length
                before = tl.load(sequence + direction * enters, mask=inside & (enters >= 0) & (enters < L), other=-1)
                after = tl.load(sequence + direction * leaves, mask=inside, other=-1)
                kept = tl.where((before == after) & (h != 0.0), products[i] * h, 0.0)
                h = tl.where(inside, kept + totals[i], h)
    return h
