"""The chunk-serial walk of ssd, and its launcher.

One program walks the chunks for a batch row, a head and BP of its channels, with the state [BP, N] in registers:

    h <- decay·h + (w·u)^T v

Forward u = x and v = B, and y of each chunk comes from C, the state that enters and a triangle of decays. The adjoint
state follows the same recurrence from the end, with u = dy and v = C. Both walks can keep the state before each chunk.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp2, sigmoid
from ssmscan.ops._triton.compose import Stretches
from ssmscan.ops._triton.fetch import fetch
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import Config, Tiles, segments_for, walk_config
from ssmscan.ops.ssd.step_sizes import Steps, token_strides
from ssmscan.ops.ssd.tiles import below, decays, followed, load_tile, place, store_tile


@triton.jit
def _load_state(
    pointer, rows, n, inside, N, BP: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr, UNIFORM: tl.constexpr
):
    if UNIFORM:
        h = tl.zeros((BP, BN), tl.float32) + tl.load(pointer).to(tl.float32)
    else:
        h = load_tile(pointer, rows, n, inside, N, EVEN_N, tl.float32)
    return h


@kernel(do_not_specialize=["L", "chunks", "length", "segments"])
def ssd_walk(
    # read
    u, v, c, D, z, added, initial, table, deltas, weights, sums,
    # written
    y, final, states,
    # written by a SUMMARY, else read
    logs, totals,
    # sizes, and how far the second sums lie behind the first
    L, H, P, chunks, length, segments, part,
    # strides; those along the time are constants
    u_batch, u_head, v_batch, v_group, c_batch, c_group, z_batch, z_head, D_head, D_p, initial_batch, initial_head,
    u_time: tl.constexpr, v_time: tl.constexpr, c_time: tl.constexpr, z_time: tl.constexpr, y_time: tl.constexpr,
    # what is walked
    PER_GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, UNIFORM: tl.constexpr, ADJOINT: tl.constexpr,
    SUMMARY: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr,
    # tiles
    PRECISE: tl.constexpr,
    DOT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, EVEN_P: tl.constexpr,
    EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one segment of the chunks, or give its SUMMARY: the logarithm of its decay, and its state from 0.

    SHIFT: a token's y is that of the token before it, 0 for the first (but for D, z and what is ``added``); the adjoint
    then reads u at the token after it. UNIFORM: an initial state is one number. WHOLE: every chunk has all of its
    tokens. FAR: they lie more than 2^31 elements apart. z gates y, or what a SUMMARY reads of its gradient.
    """
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    blocks = tl.cdiv(P, BP)
    head = tl.program_id(0) // blocks % H
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    segment = tl.program_id(1)
    batch = (tl.program_id(0) // (blocks * H)).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    inside = below(p, P, EVEN_P)
    group = head // PER_GROUP
    u += batch * u_batch + tl.cast(head, tl.int64) * u_head
    v += batch * v_batch + tl.cast(group, tl.int64) * v_group
    if c is not None:
        c += batch * c_batch + tl.cast(group, tl.int64) * c_group
    if z is not None:
        z += batch * z_batch + tl.cast(head, tl.int64) * z_head
    if y is not None:
        y += (batch * L * H + head) * P
    if added is not None:
        added += (batch * L * H + head) * P
    if D is not None:
        # layout: one number for a head costs nothing in the matrix product of each token with itself.
        skip = tl.load(D + head * D_head).to(tl.float32)
        if PER_CHANNEL:
            skip = tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    if initial is not None:
        initial += tl.cast(head, tl.int64) * initial_head
    # Tiles of states lie in (..., h, p, n), what the chunks start from in (b, h, chunks, Q).
    state_rows = p * N
    state_head = tl.cast(head, tl.int64) * P * N
    state_size = tl.cast(H, tl.int64) * P * N
    of_steps = (batch * H + head) * chunks * Q
    rows = q.to(tl.int64) if FAR else q

    h = tl.zeros((BP, BN), tl.float32)
    if not SUMMARY:
        if initial is not None and table is None:
            h = _load_state(initial + batch * initial_batch, state_rows, n, inside, N, BP, BN, EVEN_N, UNIFORM)
        if totals is not None:
            # The summaries of the segments walked before, always in the same order.
            for j in range(segment):
                row = batch * segments + j
                log = tl.load(logs + row * H + head)
                total = load_tile(totals + row * state_size + state_head, state_rows, n, inside, N, EVEN_N, tl.float32)
                # Not by a decay of 0 alone: 0·NaN would carry a NaN into the next packed sequence.
                h = tl.where(log > -float("inf"), h * exp2(log), 0.0) + total

    log = 0.0
    begin = (segments - 1 - segment if ADJOINT else segment) * length
    end = min(begin + length, chunks)
    for i in tl.range(0, end - begin, num_stages=STAGES):
        chunk = end - 1 - i if ADJOINT else begin + i
        if table is None:
            ahead = max(chunk - STAGES, begin) if ADJOINT else min(chunk + STAGES, end - 1)
            token = tl.minimum(tl.cast(ahead, tl.int64) * Q + q, L - 1)
            # layout: shared memory has no room for a third stage, so the L2 cache is asked for tokens further ahead.
            fetch(u, token * u_time, tl.program_id(0) % blocks * BP, P, BP)
        first, count = place(table, chunk, chunks, L, Q)
        exists = below(q, count, WHOLE)
        if SHIFT and ADJOINT:
            shown = followed(table, chunk, chunks, first, count, q, L)
            us = load_tile(u + (first + 1) * u_time, rows * u_time, p, shown, P, EVEN_P, DOT, True)
        else:
            us = load_tile(u + first * u_time, rows * u_time, p, exists, P, EVEN_P, DOT, True)
        if SUMMARY and z is not None:
            gate = load_tile(z + first * z_time, rows * z_time, p, exists, P, EVEN_P, tl.float32, True)
            us = (us.to(tl.float32) * gate * sigmoid(gate)).to(DOT)
        vs = load_tile(v + first * v_time, rows * v_time, n, exists, N, EVEN_N, DOT)
        at = of_steps + tl.cast(chunk, tl.int64) * Q
        pairs, entered, _, total = decays(sums + at, part, q, 1, PRECISE, Q, SHIFT and not ADJOINT)
        if table is not None:
            owner = tl.load(table + 2 * chunks + chunk).to(tl.int64)
            # Its sequence begins here, in the direction of this walk, or ends.
            enters = tl.load(table + (4 if ADJOINT else 3) * chunks + chunk) != 0
            leaves = tl.load(table + (3 if ADJOINT else 4) * chunks + chunk) != 0
            fresh = tl.zeros((BP, BN), tl.float32)
            # Two conditions, not one: the first is settled at compile time.
            if initial is not None:  # noqa: SIM102
                if enters:
                    start = initial + owner * initial_batch
                    fresh = _load_state(start, state_rows, n, inside, N, BP, BN, EVEN_N, UNIFORM)
            h = tl.where(enters, fresh, h)
            log = tl.where(enters, -float("inf"), log)
        if states is not None:
            kept = states + (batch * chunks + chunk) * state_size + state_head
            store_tile(kept, state_rows, n, h, inside, N, EVEN_N)
        if y is not None:
            if SHIFT:
                begins = chunk == 0 if table is None else tl.load(table + 3 * chunks + chunk) != 0
                preceded = (q < count) & ((q > 0) | (begins == 0))
                cs = load_tile(c + (first - 1) * c_time, rows * c_time, n, preceded, N, EVEN_N, DOT)
            else:
                cs = load_tile(c + first * c_time, rows * c_time, n, exists, N, EVEN_N, DOT)
            out = tl.dot(cs, tl.trans(h.to(DOT)), input_precision=PRECISION) * entered[:, None]
            scores = tl.dot(cs, tl.trans(vs), input_precision=PRECISION) * (pairs * tl.load(deltas + at + q)[None, :])
            if D is not None:
                if PER_CHANNEL:
                    out += tl.trans(us).to(tl.float32) * skip[None, :]
                else:
                    scores += tl.where(q[:, None] == q[None, :], skip, 0.0)
            out = tl.dot(scores.to(DOT), tl.trans(us), out, input_precision=PRECISION)
            if added is not None:
                out += load_tile(added + first * y_time, rows * y_time, p, exists, P, EVEN_P, tl.float32)
            if z is not None:
                gate = load_tile(z + first * z_time, rows * z_time, p, exists, P, EVEN_P, tl.float32)
                out *= gate * sigmoid(gate)
            store_tile(y + first * y_time, rows * y_time, p, out, exists, P, EVEN_P)
        weight = entered if ADJOINT else tl.load(weights + at + q)
        weighted = (us.to(tl.float32) * weight[None, :]).to(DOT)
        h = tl.dot(weighted, vs, h * exp2(total), input_precision=PRECISION)
        log += total
        # Two conditions, not one: the first is settled at compile time.
        if table is not None and final is not None:  # noqa: SIM102
            if leaves:
                store_tile(final + owner * state_size + state_head, state_rows, n, h, inside, N, EVEN_N)

    if SUMMARY:
        row = batch * segments + segment
        store_tile(totals + row * state_size + state_head, state_rows, n, h, inside, N, EVEN_N)
        tl.store(logs + row * H + head, log)
    elif final is not None and table is None:  # noqa: SIM102
        if segment == segments - 1:
            store_tile(final + batch * state_size + state_head, state_rows, n, h, inside, N, EVEN_N)


class Summaries(NamedTuple):
    """What each segment of a walk does to a state, h -> 2^log·h + total; float32."""

    logs: Tensor  # (b, segments, h)
    totals: Tensor  # (b, segments, h, p, n)

    def stretches(self) -> Stretches:
        return Stretches(self.logs.transpose(0, 1), self.totals.transpose(0, 1))


def summarise(
    u: Tensor, v: Tensor, steps: Steps, tiles: Tiles, reverse: bool, *, adjoint: bool = False, z: Tensor | None = None
) -> Summaries:
    """The summaries of all segments of a walk that nothing enters; u is gated by ``z``."""
    summaries = _room(u, v, steps, tiles, _segments(u, steps, tiles))
    config = walk_config(tiles, not adjoint)
    _launch(u, v, steps, None, None, tiles, reverse, summaries, config, adjoint=adjoint, z=z)
    return summaries


def walk(
    u: Tensor,
    v: Tensor,
    steps: Steps,
    initial: Tensor | None,
    table: Tensor | None,
    tiles: Tiles,
    reverse: bool,
    *,
    summaries: Summaries | None = None,
    adjoint: bool = False,
    c: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    added: Tensor | None = None,
    scan: int = 0,
    shift: bool = False,
    y: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    """Walk all chunks, writing ``y``, the ``final`` state and the ``states`` before each chunk where they are given.

    Its ``steps`` are those of this ``scan``, its ``summaries`` are made if they are not given. ``added`` is an output
    of another walk, in y's layout; ``shift`` is that of the kernel.
    """
    config = walk_config(tiles, y is not None)
    segments = _segments(u, steps, tiles)
    # Zeros come as one number, expanded.
    if initial is not None and initial.stride()[2:] != (0, 0):
        initial = initial.contiguous()
    if summaries is None and segments > 1:
        # Nothing enters after the last segment, so it needs no summary.
        summaries = _room(u, v, steps, tiles, segments)
        _launch(
            u, v, steps, initial, table, tiles, reverse, summaries, config,
            last=False, adjoint=adjoint, scan=scan, shift=shift,
        )  # fmt: skip
    _launch(
        u, v, steps, initial, table, tiles, reverse, summaries, config,
        adjoint=adjoint, c=c, D=D, z=z, added=added, scan=scan, shift=shift, y=y, final=final, states=states,
    )  # fmt: skip


def _segments(u: Tensor, steps: Steps, tiles: Tiles) -> int:
    batch, _, heads, p = u.shape
    return segments_for(batch * heads * -(-p // tiles.BP), steps.delta.shape[3])


def _room(u: Tensor, v: Tensor, steps: Steps, tiles: Tiles, segments: int) -> Summaries:
    batch, _, heads, p = u.shape
    logs = steps.delta.new_empty(batch, segments, heads)
    return Summaries(logs, logs.new_empty(batch, segments, heads, p, v.shape[3]))


def _launch(
    u: Tensor,
    v: Tensor,
    steps: Steps,
    initial: Tensor | None,
    table: Tensor | None,
    tiles: Tiles,
    reverse: bool,
    summaries: Summaries | None,
    config: Config,
    *,
    adjoint: bool,
    last: bool = True,
    c: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    added: Tensor | None = None,
    scan: int = 0,
    shift: bool = False,
    y: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    """Launch the kernel over all segments, or all but the ``last``, to summarise them if nothing else is written."""
    _, l, heads, p = u.shape
    n = v.shape[3]
    delta, weights, sums = (t[scan] for t in steps)
    batch, _, chunks, _ = delta.shape
    summary = y is None and final is None and states is None
    segments = 1 if summaries is None else summaries.logs.shape[1]
    logs, totals = (None, None) if summaries is None else summaries
    u, v = from_first(u, 1, reverse), from_first(v, 1, reverse)
    c, z, y, added = (None if t is None else from_first(t, 1, reverse) for t in (c, z, y, added))
    of_tokens = [token_strides(t, reverse) for t in (u, v, c, z, y)]
    times = [s[1] for s in of_tokens]
    far = tiles.Q * max(map(abs, times)) >= 1 << 31
    strides = [s for t in of_tokens[:4] for s in t[::2]]
    strides += (0, 0) if D is None else (D.stride(0), D.stride(-1))
    uniform = initial is not None and initial.stride()[2:] == (0, 0)
    strides += (0, 0) if initial is None else initial.stride()[:2]
    ssd_walk.launch(
        (batch * heads * -(-p // tiles.BP), segments if last else segments - 1, 1),
        (u, v, c, D, z, added, initial, table, delta, weights, sums, y, final, states, logs, totals),
        (l, heads, p, chunks, -(-chunks // segments), segments, sums.stride(0), *strides),
        (
            *times, heads // v.shape[2], D is not None and D.dim() == 2, uniform, adjoint, summary, shift,
            table is None and l % tiles.Q == 0, far, tiles.precise, tiles.DOT, tiles.Q, n, tiles.BP, tiles.BN,
            p % tiles.BP == 0, n == tiles.BN, config.stages,
        ),
        config.warps,
    )  # fmt: skip
