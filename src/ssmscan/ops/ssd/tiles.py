"""What the Triton kernels of ssd share: step sizes and decays of the Q tokens of a chunk.

Logarithms are to the base 2. Matrix products take their operands in the dtype DOT and sum in float32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of less is 0, of more inf. It keeps sums small, so that their differences lose few digits.
LARGEST = tl.constexpr(256.0)


@triton.jit
def bounded(v, low, high):
    """Clamped; a NaN stays."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def softplus(v):
    """log(1 + exp(v)), of full precision for very negative v too."""
    e = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + e
    # Rounding 1 + e loses digits of e; the same error in u - 1 makes up for it.
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, tl.where(v == v, small, v))


@triton.jit
def biased(dt, bias, head, exists):
    """The step sizes before softplus."""
    raw = tl.load(dt, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head).to(tl.float32)
    return raw


@triton.jit
def step_sizes(raw, exists, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """0 for tokens that do not exist, which so change no state."""
    delta = softplus(raw) if SOFTPLUS else raw
    return tl.where(exists, bounded(delta, LOW, HIGH), 0.0)


@triton.jit
def slopes(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The derivative of the step sizes by ``raw``; the bounds themselves count as inside."""
    delta = softplus(raw) if SOFTPLUS else raw
    # Without the bound exp overflows, to the same result.
    slope = tl.where(raw > 20.0, 1.0, 1.0 / (1.0 + tl.exp(-tl.maximum(raw, -80.0)))) if SOFTPLUS else 1.0
    return tl.where((delta >= LOW) & (delta <= HIGH), slope, 0.0)


@triton.jit
def decays(log_a, q, FROM: tl.constexpr, PRECISE: tl.constexpr):
    """The decay from token j to i where j <= i, from the begin to i and from j to the end, and the logarithm of all.

    The first is [Q, Q], j along the axis FROM, the others [Q].

    A difference of two sums has the rounding errors of both. If PRECISE, whole numbers, whose sums are exact, and what
    remains are summed apart.
    """
    TO: tl.constexpr = 1 - FROM
    lower = tl.expand_dims(q, FROM) >= tl.expand_dims(q, TO)
    if PRECISE:
        whole = tl.floor(log_a + 0.5)
        rest = log_a - whole
        wholes = tl.cumsum(whole, 0)
        rests = tl.cumsum(rest, 0)
        total = tl.sum(whole, 0)
        remaining = tl.sum(rest, 0)
        pairs = tl.expand_dims(wholes, FROM) - tl.expand_dims(wholes, TO)
        pairs += tl.expand_dims(rests, FROM) - tl.expand_dims(rests, TO)
        entered = wholes + rests
        left = (total - wholes) + (remaining - rests)
        total += remaining
    else:
        entered = tl.cumsum(log_a, 0)
        total = tl.sum(log_a, 0)
        pairs = tl.expand_dims(entered, FROM) - tl.expand_dims(entered, TO)
        left = total - entered
    return tl.exp2(tl.where(lower, pairs, -float("inf"))), tl.exp2(entered), tl.exp2(left), total


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
def load_tile(pointer, rows, columns, exists, SIZE, EVEN: tl.constexpr, DOT: tl.constexpr):
    """The tile at ``pointer + rows[:, None] + columns[None, :]``, zero where a row or column does not exist."""
    pointers = pointer + (rows[:, None] + columns[None, :])
    mask = exists[:, None] if EVEN else exists[:, None] & (columns < SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT)


@triton.jit
def store_tile(pointer, rows, columns, tile, exists, SIZE, EVEN: tl.constexpr):
    pointers = pointer + (rows[:, None] + columns[None, :])
    mask = exists[:, None] if EVEN else exists[:, None] & (columns < SIZE)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)
