"""What the Triton kernels of ssd share: tiles of the tensors, and the decays between the Q tokens of a chunk.

Logarithms are to the base 2. Matrix products take their operands in the dtype DOT and sum in float32.
"""

import triton
import triton.language as tl

from ssmscan.ops._triton.activation import exp2

# exp2 of less is 0, of more inf. It keeps sums small, so that their differences lose few digits.
LARGEST = tl.constexpr(256.0)


@triton.jit
def bounded(v, low, high):
    """Clamped; a NaN stays."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _earlier(sums, q):
    """The sums up to the tokens before q."""
    return tl.load(sums + q - 1, mask=q > 0, other=0.0)


@triton.jit
def logarithms(sums, part, q, FROM: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr, SHIFT: tl.constexpr):
    """The logarithms of the decays from token j to i, from the begin to i, from j to the end, and from begin to end.

    The first is [Q, Q], j along the axis FROM, of meaning where j <= i; the next two are [Q]. With SHIFT they are to
    i - 1. ``sums`` are those of the log-decays from the chunk's begin on. A difference of two has the rounding errors
    of both; if PRECISE, whole numbers, whose sums are exact, and what remains (``part`` further on) are summed apart.
    """
    TO: tl.constexpr = 1 - FROM
    at = tl.load(sums + q)
    entered = _earlier(sums, q) if SHIFT else at
    total = tl.load(sums + (Q - 1))
    pairs = tl.expand_dims(entered, FROM) - tl.expand_dims(at, TO)
    left = total - at
    if PRECISE:
        rests = tl.load(sums + part + q)
        before = _earlier(sums + part, q) if SHIFT else rests
        remaining = tl.load(sums + part + (Q - 1))
        pairs += tl.expand_dims(before, FROM) - tl.expand_dims(rests, TO)
        left += remaining - rests
        entered += before
        total += remaining
    return pairs, entered, left, total


@triton.jit
def decays(sums, part, q, FROM: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr, SHIFT: tl.constexpr):
    """These decays, of the last the logarithm; those from a token to an earlier one, or to itself with SHIFT, are 0."""
    pairs, entered, left, total = logarithms(sums, part, q, FROM, PRECISE, Q, SHIFT)
    later = tl.expand_dims(q, FROM) >= tl.expand_dims(q, 1 - FROM) + SHIFT
    return exp2(tl.where(later, pairs, -float("inf"))), exp2(entered), exp2(left), total


@triton.jit
def place(table, chunk, chunks, L, Q: tl.constexpr):
    """The first position of a chunk and how many it has; with packing they stand in the ``table``."""
    if table is None:
        begin = tl.cast(chunk, tl.int64) * Q
        count = tl.minimum(L - begin, Q).to(tl.int32)
    else:
        begin = tl.load(table + chunk).to(tl.int64)
        count = tl.load(table + chunks + chunk)
    return begin, count


@triton.jit
def followed(table, chunk, chunks, first, count, q, L):
    """Which tokens of a chunk have a next one in their sequence."""
    return first + q + 1 < L if table is None else q < count - tl.load(table + 4 * chunks + chunk)


@triton.jit
def below(index, end, ALL: tl.constexpr):
    """Which of some indices are below ``end``: ALL of them, if the compiler is to know it."""
    return tl.full(index.shape, True, tl.int1) if ALL else index < end


@triton.jit
def heads_of(PER_GROUP: tl.constexpr, HEADS: tl.constexpr):
    """This program's group, its part of the group's heads, and the first and end of those; axis 1 are these parts."""
    SPLITS: tl.constexpr = (PER_GROUP + HEADS - 1) // HEADS
    group = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    first = group * PER_GROUP + split * HEADS
    return group.to(tl.int64), split.to(tl.int64), first, min(first + HEADS, (group + 1) * PER_GROUP)


@triton.jit
def tokens_of(table, chunks, L, Q: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr):
    """This program's batch row and chunk, as which axis 0 counts, the chunk's place, and its tokens.

    Those are [Q]: their indices, the same with as many bits as offsets take, and whether there are such tokens.
    """
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, Q)
    first, count = place(table, chunk, chunks, L, Q)
    return batch, chunk, first, count, q, q.to(tl.int64) if FAR else q, below(q, count, WHOLE)


@triton.jit
def load_tile(
    pointer, rows, columns, exists, SIZE, EVEN: tl.constexpr, DOT: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """The tile at ``pointer + rows[:, None] + columns[None, :]``, zero where a row or column does not exist.

    TRANSPOSED: its transpose, for a left operand that is scaled first; with ``tl.trans`` in its place the compiler
    takes another way through shared memory, and loads no tile ahead.
    """
    if TRANSPOSED:
        pointers = pointer + (columns[:, None] + rows[None, :])
        mask = exists[None, :] if EVEN else exists[None, :] & (columns < SIZE)[:, None]
    else:
        pointers = pointer + (rows[:, None] + columns[None, :])
        mask = exists[:, None] if EVEN else exists[:, None] & (columns < SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT)


@triton.jit
def store_tile(pointer, rows, columns, tile, exists, SIZE, EVEN: tl.constexpr):
    """Store where :func:`load_tile` with the same arguments would load."""
    pointers = pointer + (rows[:, None] + columns[None, :])
    mask = exists[:, None] if EVEN else exists[:, None] & (columns < SIZE)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)
