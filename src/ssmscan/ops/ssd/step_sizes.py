"""The step sizes of ssd and the sums of log-decays, from which all its other kernels start; and their gradients."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E, exp2, sigmoid, softplus
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import Tiles
from ssmscan.ops.ssd.tiles import LARGEST, bounded, place

# Heads that a program takes at once.
HEADS = 8


class Steps(NamedTuple):
    """Of each scan, and of each batch row, head, chunk and token there, in scan order; float32."""

    delta: Tensor  # the step sizes, (scans, b, h, chunks, Q); 0 for tokens that do not exist, which so change no state
    weights: Tensor  # these times the decay from the token to the chunk's end, (scans, b, h, chunks, Q)
    sums: Tensor  # of the log-decays from the chunk's begin, (scans, 1 or 2, b, h, chunks, Q); see tiles.decays


class StateFlows(NamedTuple):
    """What flows over decays from and to the states, of each scan; float32. Sums of the last axis."""

    into: Tensor  # from the entering state into each token, (scans, b, h, chunks, Q, 2)
    onward: Tensor  # from each token, for a step size of 1, into the leaving state, (scans, b, h, chunks, Q, 2)
    through: Tensor  # from the entering to the leaving state, for a decay of 1, (scans, b, h, chunks, some)


class PairFlows(NamedTuple):
    """What the gradients of the step sizes and of D are sums of; float32."""

    # Of each token the gradient of the step size as a factor of x, and what flows over its decay,
    # (scans, b, h, chunks, Q, 2)
    tokens: Tensor
    skipped: Tensor | None  # the gradient of D is the sum of these, (b, h, chunks, 4), if there is one for a head


@triton.jit
def _before_bounds(dt, bias, first, q, heads, exists, inside, dt_time, dt_head):
    """The step sizes before softplus, [Q, BH]."""
    pointers = dt + ((first + q) * dt_time)[:, None] + (heads.to(tl.int64) * dt_head)[None, :]
    raw = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + heads, mask=inside, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def _sums(pointers, values, q, mask, Q: tl.constexpr):
    """Store the sums of ``values``, [Q, BH], up to each token, and return what is left from it to the last one."""
    sums = tl.cumsum(values, 0)
    tl.store(pointers, tl.trans(sums), mask=mask)
    # The last of the sums themselves, so that nothing is left there.
    return tl.sum(tl.where((q == Q - 1)[:, None], sums, 0.0), 0)[None, :] - sums


@kernel(do_not_specialize=["L", "chunks"])
def ssd_steps(
    # read
    dt, A, bias, table,
    # written
    deltas, weights, sums,
    # sizes and strides
    L, H, chunks, part, dt_batch, dt_time, dt_head,
    # constants
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % chunks
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, Q)
    first, count = place(table, chunk, chunks, L, Q)
    inside = heads < H
    exists = (q < count)[:, None] & inside[None, :]
    raw = _before_bounds(dt + batch * dt_batch, bias, first, q, heads, exists, inside, dt_time, dt_head)
    delta = softplus(raw) if SOFTPLUS else raw
    delta = tl.where(exists, bounded(delta, LOW, HIGH), 0.0)
    rate = tl.load(A + heads, mask=inside, other=0.0).to(tl.float32) * LOG2E
    log_a = bounded(delta * rate[None, :], -LARGEST, LARGEST)
    # From here on tokens are adjacent.
    at = (((batch * H + heads) * chunks + chunk) * Q)[:, None] + q[None, :]
    mask = inside[:, None]
    tl.store(deltas + at, tl.trans(delta), mask=mask)
    whole = tl.floor(log_a + 0.5) if PRECISE else log_a
    left = _sums(sums + at, whole, q, mask, Q)
    if PRECISE:
        left += _sums(sums + part + at, log_a - whole, q, mask, Q)
    tl.store(weights + at, tl.trans(delta * exp2(left)), mask=mask)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_step_gradients(
    # read
    dt, A, bias, table, deltas, sums, tokens, into, onward, through, skipped,
    # written
    ddt, parts,
    # sizes and strides
    L, H, chunks, part, dt_batch, dt_time, dt_head, ddt_time,
    # constants
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr,
    PASSING: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and those of A, dt_bias and D for each chunk."""
    chunk = tl.program_id(0) % chunks
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    # From the last token on: what flows into a token flows over all decays up to it.
    q = Q - 1 - tl.arange(0, Q)
    first, count = place(table, chunk, chunks, L, Q)
    inside = heads < H
    exists = (q < count)[:, None] & inside[None, :]
    raw = _before_bounds(dt + batch * dt_batch, bias, first, q, heads, exists, inside, dt_time, dt_head)
    delta = softplus(raw) if SOFTPLUS else raw
    # The bounds themselves count as inside.
    slope = tl.where((delta >= LOW) & (delta <= HIGH), sigmoid(raw) if SOFTPLUS else 1.0, 0.0)
    rows = (batch * H + heads) * chunks + chunk
    at = (rows * Q)[:, None] + q[None, :]
    mask = inside[:, None]
    total = tl.load(sums + rows * Q + (Q - 1), mask=inside, other=0.0)
    if PRECISE:
        total += tl.load(sums + part + rows * Q + (Q - 1), mask=inside, other=0.0)
    passing = tl.load(through + (rows * PASSING)[:, None] + tl.arange(0, PASSING)[None, :], mask=mask, other=0.0)
    two = 2 * at[:, :, None] + tl.arange(0, 2)
    own, crossing = tl.split(tl.load(tokens + two, mask=mask[:, :, None], other=0.0))
    own += tl.sum(tl.load(onward + two, mask=mask[:, :, None], other=0.0), 2)
    # Over a decay flows what comes from the state before to the tokens from it on, from tokens before it to the state
    # after, and from state to state. Sums of just these: where the decay is 0 they are 0 too.
    arriving = tl.sum(tl.load(into + two, mask=mask[:, :, None], other=0.0), 2)
    past = mask & (q > 0)[None, :]
    leaving = tl.sum(tl.load(onward + two - 2, mask=past[:, :, None], other=0.0), 2)
    leaving *= tl.load(deltas + at - 1, mask=past, other=0.0)
    flow = crossing + tl.cumsum(arriving, 1) + tl.cumsum(leaving, 1, reverse=True)
    flow += (tl.sum(passing, 1) * exp2(total))[:, None]
    rate = tl.load(A + heads, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.trans(own + flow * rate[:, None])
    gradient = tl.where(exists, gradient * slope, 0.0)
    pointers = ddt + batch * L * H + ((first + q) * ddt_time)[:, None] + heads[None, :]
    tl.store(pointers, gradient.to(ddt.dtype.element_ty), mask=exists)
    of_chunk = parts + (batch * chunks + chunk) * (3 * H) + heads
    tl.store(of_chunk, tl.sum(flow * tl.load(deltas + at, mask=mask, other=0.0), 1), mask=inside)
    tl.store(of_chunk + H, tl.sum(gradient, 0), mask=inside)
    of_D = tl.zeros((BH,), tl.float32)
    if skipped is not None:
        of_D = tl.sum(tl.load(skipped + 4 * rows[:, None] + tl.arange(0, 4)[None, :], mask=mask, other=0.0), 1)
    tl.store(of_chunk + 2 * H, of_D, mask=inside)


def steps(
    scans: list[tuple[Tensor, bool]],
    A: Tensor,
    bias: Tensor | None,
    tables: list[Tensor | None],
    tiles: Tiles,
    options: tuple[bool, float, float],
) -> Steps:
    """Each of the ``scans`` has its dt, goes from the end or not, and has its table of chunks.

    ``options`` are those of softplus, and the least and largest step size.
    """
    batch, l, heads = scans[0][0].shape
    chunks = -(-l // tiles.Q) if tables[0] is None else tables[0].shape[1]
    delta, weights = A.new_empty(2, len(scans), batch, heads, chunks, tiles.Q)
    sums = A.new_empty(len(scans), 1 + tiles.precise, *delta.shape[1:])
    for scan, (dt, reverse) in enumerate(scans):
        ssd_steps.launch(
            (batch * chunks, -(-heads // HEADS), 1),
            (from_first(dt, 1, reverse), A, bias, tables[scan], delta[scan], weights[scan], sums[scan]),
            (l, heads, chunks, sums.stride(1), *token_strides(dt, reverse)),
            (*options, tiles.precise, tiles.Q, HEADS),
            4,
        )
    return Steps(delta, weights, sums)


def step_gradients(
    scan: int,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    steps: Steps,
    pairs: PairFlows,
    states: StateFlows,
    ddt: Tensor,
    parts: Tensor,
    skips: bool,
    tiles: Tiles,
    options: tuple[bool, float, float],
    reverse: bool,
) -> None:
    """Write ``ddt`` and to ``parts``, (b, chunks, 3·h), those of dA, dbias and, if the scan ``skips``, of dD."""
    batch, l, heads = dt.shape
    chunks = steps.delta.shape[3]
    dt, ddt = from_first(dt, 1, reverse), from_first(ddt, 1, reverse)
    ddt_time = token_strides(ddt, reverse)[1]
    of_scan = [t[scan] for t in (steps.delta, steps.sums, pairs.tokens, *states)]
    skipped = pairs.skipped if skips else None
    ssd_step_gradients.launch(
        (batch * chunks, -(-heads // HEADS), 1),
        (dt, A, bias, table, *of_scan, skipped, ddt, parts),
        (l, heads, chunks, steps.sums.stride(1), *token_strides(dt, reverse), ddt_time),
        (*options, tiles.precise, tiles.Q, states.through.shape[4], HEADS),
        4,
    )


def token_strides(tensor: Tensor | None, reverse: bool) -> tuple[int, int, int]:
    """Of a batch row, of a token in scan order, and of a head or group; zeros for a tensor that is not given."""
    if tensor is None:
        return 0, 0, 0
    batch, time, head = tensor.stride()[:3]
    return batch, -time if reverse else time, head
