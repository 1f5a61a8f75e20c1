"""The chunk-serial walk of ssd, and its launcher.

One program walks the chunks for a batch row, a head and BP of its channels, with the state [BP, N] in registers:

    h <- decay·h + (w·u)^T v

Forward u = x and v = B, and y of each chunk comes from C, the state that enters and a triangle of decays. The adjoint
state follows the same recurrence from the end, with u = dy and v = C. Both walks can keep the state before each chunk.
"""

from typing import Any

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.ssd.configs import WALK, Tiles, plan
from ssmscan.ops.ssd.tiles import LARGEST, LOG2E, biased, bounded, decays, load_tile, place, step_sizes, store_tile


@kernel(do_not_specialize=["L", "chunks", "length", "segments"])
def ssd_walk(
    u, v, c, dt, A, bias, D, z, initial, table, y, final, states, logs, totals,
    L, H, P, N, chunks, length, segments,
    u_batch, u_time, u_head, v_batch, v_time, v_group, c_batch, c_time, c_group, dt_batch, dt_time, dt_head,
    z_batch, z_time, z_head, D_head, D_p, initial_batch, initial_head, initial_p, initial_n,
    PER_GROUP: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one segment of the chunks, or give its SUMMARY: the logarithm of its decay, and its state from 0."""
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    blocks = tl.cdiv(P, BP)
    head = tl.program_id(0) // blocks
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    inside = p < P
    group = head // PER_GROUP
    # Positions count in scan order; a reversed scan starts at the last token and takes negative steps.
    direction = -1 if REVERSE else 1
    y_time = H * P
    origin = tl.cast(L - 1 if REVERSE else 0, tl.int64)
    u += batch * u_batch + origin * u_time + tl.cast(head, tl.int64) * u_head
    v += batch * v_batch + origin * v_time + tl.cast(group, tl.int64) * v_group
    dt += batch * dt_batch + origin * dt_time + tl.cast(head, tl.int64) * dt_head
    if c is not None:
        c += batch * c_batch + origin * c_time + tl.cast(group, tl.int64) * c_group
    if z is not None:
        z += batch * z_batch + origin * z_time + tl.cast(head, tl.int64) * z_head
    if y is not None:
        y += ((batch * L + origin) * H + head) * P
    if D is not None:
        skip = tl.load(D + head * D_head + p * D_p, mask=inside, other=0.0).to(tl.float32)
    if initial is not None:
        initial += tl.cast(head, tl.int64) * initial_head
        initial_tile = p.to(tl.int64)[:, None] * initial_p + n.to(tl.int64)[None, :] * initial_n
    state_mask = inside[:, None] & (n < N)[None, :]
    rate = tl.load(A + head).to(tl.float32) * LOG2E
    # A tile of the state in (..., h, p, n).
    state_rows = (tl.cast(head, tl.int64) * P + p) * N
    state_size = tl.cast(H, tl.int64) * P * N

    h = tl.zeros((BP, BN), tl.float32)
    if not SUMMARY:
        if initial is not None and table is None:
            h = tl.load(initial + batch * initial_batch + initial_tile, mask=state_mask, other=0.0).to(tl.float32)
        if totals is not None:
            # The summaries of the segments walked before, always in the same order.
            for j in range(segment):
                row = batch * segments + j
                log = tl.load(logs + row * H + head)
                total = load_tile(totals + row * state_size, state_rows, n, inside, N, EVEN_N, tl.float32)
                # Not by a decay of 0 alone: 0·NaN would carry a NaN into the next packed sequence.
                h = tl.where(log > -float("inf"), h * tl.exp2(log), 0.0) + total

    log = 0.0
    begin = (segments - 1 - segment if ADJOINT else segment) * length
    end = min(begin + length, chunks)
    for i in tl.range(0, end - begin, num_stages=STAGES):
        chunk = end - 1 - i if ADJOINT else begin + i
        first, count = place(table, chunk, chunks, L, Q)
        exists = q < count
        t = (first + q) * direction
        us = load_tile(u, t * u_time, p, exists, P, EVEN_P, DOT)
        vs = load_tile(v, t * v_time, n, exists, N, EVEN_N, DOT)
        raw = biased(dt + t * dt_time, bias, head, exists)
        delta = step_sizes(raw, exists, SOFTPLUS, LOW, HIGH)
        pairs, entered, left, total = decays(bounded(delta * rate, -LARGEST, LARGEST), q, 1, PRECISE)
        if table is not None:
            owner = tl.load(table + 2 * chunks + chunk).to(tl.int64)
            # Its sequence begins here, in the direction of this walk, or ends.
            enters = tl.load(table + (4 if ADJOINT else 3) * chunks + chunk) != 0
            leaves = tl.load(table + (3 if ADJOINT else 4) * chunks + chunk) != 0
            if enters:
                log = -float("inf")
                if initial is None:
                    h = tl.zeros((BP, BN), tl.float32)
                else:
                    h = tl.load(
                        initial + owner * initial_batch + initial_tile, mask=state_mask, other=0.0
                    ).to(tl.float32)  # fmt: skip
        if states is not None:
            store_tile(states + (batch * chunks + chunk) * state_size, state_rows, n, h, inside, N, EVEN_N)
        if y is not None:
            cs = load_tile(c, t * c_time, n, exists, N, EVEN_N, DOT)
            out = tl.dot(cs, tl.trans(h.to(DOT)), input_precision=PRECISION) * entered[:, None]
            scores = tl.dot(cs, tl.trans(vs), input_precision=PRECISION) * (pairs * delta[None, :])
            out += tl.dot(scores.to(DOT), us, input_precision=PRECISION)
            if D is not None:
                out += us.to(tl.float32) * skip[None, :]
            if z is not None:
                gate = load_tile(z, t * z_time, p, exists, P, EVEN_P, tl.float32)
                out *= gate / (1.0 + tl.exp(-gate))
            store_tile(y, t * y_time, p, out, exists, P, EVEN_P)
        weights = entered if ADJOINT else left * delta
        weighted = (us.to(tl.float32) * weights[:, None]).to(DOT)
        h = h * tl.exp2(total) + tl.dot(tl.trans(weighted), vs, input_precision=PRECISION)
        log += total
        # Two conditions, not one: the first is settled at compile time.
        if table is not None and final is not None:  # noqa: SIM102
            if leaves:
                store_tile(final + owner * state_size, state_rows, n, h, inside, N, EVEN_N)

    if SUMMARY:
        row = batch * segments + segment
        store_tile(totals + row * state_size, state_rows, n, h, inside, N, EVEN_N)
        tl.store(logs + row * H + head, log)
    elif final is not None and table is None:  # noqa: SIM102
        if segment == segments - 1:
            store_tile(final + batch * state_size, state_rows, n, h, inside, N, EVEN_N)


def walk(
    u: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    table: Tensor | None,
    tiles: Tiles,
    step: tuple[bool, float, float],
    reverse: bool,
    *,
    adjoint: bool = False,
    c: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    y: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    """Walk all chunks, writing ``y``, the ``final`` state and the ``states`` before each chunk where they are given."""
    batch, l, heads, p = u.shape
    n = v.shape[3]
    config = WALK[tiles.precise, y is not None]
    chunks = -(-l // tiles.Q) if table is None else table.shape[1]
    blocks = -(-p // tiles.BP)
    length, segments = plan(batch * heads * blocks, chunks)
    strides = [s for t in (u, v, c, dt, z) for s in ((0, 0, 0) if t is None else t.stride()[:3])]
    strides += (0, 0) if D is None else D.stride()
    strides += (0, 0, 0, 0) if initial is None else initial.stride()
    integers = (l, heads, p, n, chunks, length, segments, *strides)

    def constants(summary: bool) -> tuple[Any, ...]:
        return (
            heads // v.shape[2], *step, reverse, adjoint, summary, tiles.precise, tiles.DOT,
            tiles.Q, tiles.BP, tiles.BN, p % tiles.BP == 0, n == tiles.BN, config.stages,
        )  # fmt: skip

    logs = totals = None
    if segments > 1:
        logs = u.new_empty(batch, segments, heads, dtype=A.dtype)
        totals = u.new_empty(batch, segments, heads, p, n, dtype=A.dtype)
        # Nothing enters after the last segment, so it needs no summary.
        ssd_walk.launch(
            (heads * blocks, segments - 1, batch),
            (u, v, None, dt, A, bias, None, None, initial, table, None, None, None, logs, totals),
            integers,
            constants(True),
            config.warps,
        )
    ssd_walk.launch(
        (heads * blocks, segments, batch),
        (u, v, c, dt, A, bias, D, z, initial, table, y, final, states, logs, totals),
        integers,
        constants(False),
        config.warps,
    )
