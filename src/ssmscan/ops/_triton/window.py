"""Sliding windows: a program goes along the sequence row by row, each row a vector of BD channels.

A thread holds several adjacent channels, which it loads in one vector of up to 16 bytes, and a tile of rows is loaded
before the first of them is used. Positions are counted in scan order: of a reversed scan, a kernel is given the tensors
from their last token on, and negative steps. (Steps multiplied by the direction in the kernel double its registers.)
"""

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.cover import Cover


def cover(batch: int, l: int, d: int, BD: int, rows: int, programs: int) -> Cover:
    """Segments of whole tiles, so many that there are about ``programs`` of them."""
    blocks = -(-d // BD)
    wanted = max(programs // (batch * blocks), 1)
    return Cover.of(blocks, l, wanted, rows)


def from_first(tensor: Tensor, axis: int, reverse: bool) -> Tensor:
    """``tensor`` from the first token in scan order on."""
    return tensor.narrow(axis, -1, 1) if reverse else tensor


@triton.jit
def load_row(pointer, exists, channels, D, EVEN: tl.constexpr):
    """BD channels at ``pointer``; zeros if the row does not exist, or that never happens where ``exists`` is True."""
    if exists is not True:
        row = tl.load(pointer + channels, mask=(channels < D) & exists, other=0.0)
    elif EVEN:
        row = tl.load(pointer + channels)
    else:
        row = tl.load(pointer + channels, mask=channels < D, other=0.0)
    return row


@triton.jit
def store_row(pointer, row, exists, channels, D, EVEN: tl.constexpr):
    """Store where :func:`load_row` with the same arguments would load."""
    value = row.to(pointer.dtype.element_ty)
    if exists is not True:
        tl.store(pointer + channels, value, mask=(channels < D) & exists)
    elif EVEN:
        tl.store(pointer + channels, value)
    else:
        tl.store(pointer + channels, value, mask=channels < D)


@triton.jit
def rows_before(x, h0, t, start, step, channels, D, N: tl.constexpr, EVEN: tl.constexpr):
    """The N rows before position t as float32, a tuple; those before the sequence's ``start`` are in its state h0."""
    rows = ()
    for k in tl.static_range(N):
        position = t - N + k
        rows = rows + (load_row(x + position * step, position >= start, channels, D, EVEN).to(tl.float32),)
    # Two conditions, not one: the first is settled at compile time.
    if h0 is not None:  # noqa: SIM102
        if t < start + N:
            mixed = ()
            for k in tl.static_range(N):
                position = t - N + k
                state = load_row(h0 + (position - start + N) * D, position < start, channels, D, EVEN)
                mixed = mixed + (tl.where(position >= start, rows[k], state.to(tl.float32)),)
            rows = mixed
    return rows


@triton.jit
def sequence_of(sequence, bounds, position, L, direction):
    """Of the packed sequence at ``position``: its number, and its first and end position, all in scan order."""
    number = tl.load(sequence + direction * position).to(tl.int64)
    first = tl.load(bounds + number)
    end = tl.load(bounds + number + 1)
    return number, tl.where(direction < 0, L - end, first), tl.where(direction < 0, L - first, end)
