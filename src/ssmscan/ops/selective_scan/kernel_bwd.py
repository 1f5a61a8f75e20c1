"""The backward of selective_scan, and its launcher: every gradient in one walk against the scan order.

With g_t the gradient of h_t, dy the output's (times silu(z)) and e_t = exp(δ_t·A):

    g_t = C_t·dy_t + e_{t+1}·g_{t+1},    dC = Σ_d dy·h,    dB = Σ_d g·δ·x,    dx = D·dy + δ·(g·B),
    q_t = g_t·e_t·h_{t-1},    dA = Σ_t δ·q,    dδ = x·(g·B) + Σ_n A·q

For each run, a stretch of at most SPAN steps between two saved states, a first pass recomputes the states and keeps
every fourth in memory, a scratch that stays in the cache. The second pass goes back over the four steps after each of
these, whose states and decays it holds in registers. Both load a tile of four steps while they work on another: what
comes from the cache waits behind what was asked of the device's memory before.

Each warp leaves its sums of dB and dC in the scratch too; they are added at the end of the run, so that warps wait for
each other only there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E, sigmoid
from ssmscan.ops._triton.compose import Enter
from ssmscan.ops._triton.gradients import room, rows, state_room, sum_rows
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import batch_and_time, channels_last
from ssmscan.ops.selective_scan.autograd import SPAN, Inputs, Options
from ssmscan.ops.selective_scan.configs import backward_config
from ssmscan.ops.selective_scan.interleave import interleave, separate
from ssmscan.ops.selective_scan.kernel_fwd import passes, stretches, summarise
from ssmscan.ops.selective_scan.lanes import (
    by_channel,
    load_channels,
    load_lanes,
    load_state_rows,
    load_steps,
    pick,
    step_sizes,
    store_lanes,
    store_steps,
    sum_channels,
    sum_states,
)
from ssmscan.ops.selective_scan.plan import cover, rates_of, runs_of
from ssmscan.ops.selective_scan.tile import LN2, in_run, vary

# Sums of dB and dC that are added at a time.
ADDED = tl.constexpr(512)


@triton.jit
def _again(
    xs, dts, bs, h, a, bias, t, low, high,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The state after the four steps from position t."""
    S: tl.constexpr = N // 4
    exists = in_run(t + tl.arange(0, 4), low, high, PACKED)
    _, delta = step_sizes(dts, bias, exists, SOFTPLUS)
    u = delta * by_channel(xs)
    for i in tl.static_range(4):
        h = tl.exp2(a * pick(delta, i, S)) * h + bs[i] * pick(u, i, S)
    return h


@triton.jit
def _tile(
    xs, dts, zs, dys, bs, cs, D, z, dx, ddt, dz, sums, h, g, dA, dD, dbias, a, skip, bias,
    step, t, low, high, one, channels, inside,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, CL: tl.constexpr, KEPT: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """Walk back over the four steps from position t, before which the state is h."""
    S: tl.constexpr = N // 4
    C: tl.constexpr = h.shape[1]
    exists = in_run(t + tl.arange(0, 4), low, high, PACKED)
    raw, delta = step_sizes(dts, bias, exists, SOFTPLUS)
    v = by_channel(xs)
    w = by_channel(dys)
    if z is not None:
        gate = by_channel(zs)
        opened = sigmoid(gate)
        gated = w * opened * (1.0 + gate * (1.0 - opened))
        w *= gate * opened
    u = delta * v
    # The states before and after each step, and its decay.
    hs = (h,)
    decays = ()
    for i in tl.static_range(4):
        decay = tl.exp2(a * pick(delta, i, S))
        h = decay * h + bs[i] * pick(u, i, S)
        decays = decays + (decay,)
        hs = hs + (h,)
    # The walk goes backward, so the steps are gathered from the front.
    outs = ()
    gBs = ()
    qAs = ()
    both = ()
    for i in tl.static_range(3, -1, -1):
        c = cs[i]
        now = pick(w, i, S)
        after = hs[i + 1]
        if z is not None:
            outs = (tl.sum(c * after, 3),) + outs
        g += c * now
        if sums is not None:
            both = (sum_channels(g * pick(u, i, S), after * now, CL),) + both
        gBs = (tl.sum(g * bs[i], 3),) + gBs
        g *= decays[i]
        q = g * hs[i]
        dA += q * pick(delta, i, S)
        qAs = (tl.sum(q * a, 3),) + qAs
    gB = sum_states(gBs)
    of_step = v * gB + LN2 * sum_states(qAs)
    if SOFTPLUS:
        of_step *= sigmoid(raw)
    of_step = tl.where(exists[None, None, :], of_step, 0.0)
    into = delta * gB
    if D is not None:
        into += skip * w
    dD += w * v
    dbias += of_step
    if dx is not None:
        store_steps(dx, step, t, exists, channels, one, inside, into)
    if ddt is not None:
        store_steps(ddt, step, t, exists, channels, one, inside, of_step)
    if dz is not None:
        out = sum_states(outs)
        if D is not None:
            out += skip * v
        store_steps(dz, step, t, exists, channels, one, inside, out * gated)
    if sums is not None:
        WIDE: tl.constexpr = 8 // CL * 4
        every = tl.permute(tl.join(tl.join(both[0], both[1]), tl.join(both[2], both[3])), (0, 1, 2, 4, 3))  # type: ignore[misc]
        every = tl.reshape(every, [C // CL, CL * S, WIDE])
        if KEPT == 1:
            every = tl.sum(every, 0)[None, :, :]
        # layout: rows of warps come second, so that each stores what it has.
        column = (tl.arange(0, CL * S) * WIDE)[:, None] + tl.arange(0, WIDE)[None, :]
        pointers = sums + (column[:, None, :] + (tl.arange(0, KEPT) * (EVERY * 2 * N))[None, :, None])
        tl.store(pointers, tl.permute(every, (1, 0, 2)))
    return g, dA, dD, dbias


@triton.jit
def _add_sums(sums, partial, first, low, high, N: tl.constexpr, KEPT: tl.constexpr, EVERY: tl.constexpr):
    """Add what the rows of warps have kept over a run whose tiles begin at position ``first``."""
    end = (high - first + 3) // 4 * (8 * N)
    for begin in range(0, end, ADDED):
        at = begin + tl.arange(0, ADDED)
        total = tl.zeros((ADDED,), tl.float32)
        for row in tl.static_range(KEPT):
            total += tl.load(sums + row * (EVERY * 2 * N) + at, mask=at < end, other=0.0)
        position = first + at // (8 * N) * 4 + at % 4
        tl.store(partial + tl.cast(first, tl.int64) * (2 * N) + at, total, mask=in_run(position, low, high, True))


@kernel(do_not_specialize=["L", "n", "one", "length", "segments"])
def selective_scan_backward(
    # read; the scratch is written too
    x, dt, A, BC, D, z, dt_bias, dy, h0, owners, starts, ends, saved, scratch, dh, elapsed, totals,
    # written
    dx, ddt, dz, parts, partial, dh0,
    # sizes, and a 1 that the compiler must not know
    L, d, n, per_group, blocks, length, segments, one,
    # strides
    x_batch, x_time, dt_batch, dt_time, z_batch, z_time, dy_batch, dy_time,
    # constants
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, CL: tl.constexpr, KEPT: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """All gradients over one segment, of a multiple of EVERY steps; segments count against the scan."""
    PACKED: tl.constexpr = starts is not None
    SIZE: tl.constexpr = R * C * N
    groups = d // per_group
    walker = tl.program_id(0)
    group = walker // blocks % groups
    own = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    within = walker % blocks * (R * C) + own
    inside = within < per_group
    channels = group * per_group + within
    segment = tl.program_id(1)
    batch = (walker // (blocks * groups)).to(tl.int64)
    begin = (segments - 1 - segment) * length

    origin = tl.cast(L - 1 if REVERSE else 0, tl.int64)
    direction = -1 if REVERSE else 1
    x += batch * x_batch + origin * x_time
    dt += batch * dt_batch + origin * dt_time
    dy += batch * dy_batch + origin * dy_time
    x_step = direction * x_time
    dt_step = direction * dt_time
    dy_step = direction * dy_time
    # B and C lie in scan order.
    tiles = tl.cdiv(L, 4)
    BC += (batch * groups + group) * tiles * (8 * N)
    saved += batch * tl.cdiv(L, EVERY) * n * d
    scratch += (walker.to(tl.int64) * segments + segment) * (EVERY // 4 * SIZE + KEPT * EVERY * 2 * N)
    sums = None
    if partial is not None:
        partial += walker.to(tl.int64) * tiles * (8 * N)
        sums = scratch + EVERY // 4 * SIZE
    out = (batch * L + origin) * d
    if z is not None:
        z += batch * z_batch + origin * z_time
    if dx is not None:
        dx += out
    if ddt is not None:
        ddt += out
    if dz is not None:
        dz += out

    a = load_lanes(A, channels, inside, N, 1, N, N) * LOG2E
    skip = tl.zeros((R, C, 1), tl.float32)
    bias = tl.zeros((R, C, 1), tl.float32)
    if D is not None:
        skip = load_channels(D, channels, inside)
    if dt_bias is not None:
        bias = load_channels(dt_bias, channels, inside)
    g = tl.zeros((R, C, N // 4, 4), tl.float32)
    dA_sum = tl.zeros((R, C, N // 4, 4), tl.float32)
    dD_sum = tl.zeros((R, C, 4), tl.float32)
    dbias = tl.zeros((R, C, 4), tl.float32)
    if dh is not None and not PACKED:
        g = load_lanes(dh + batch * d * n, channels, inside, n * one, one, n, N)
    if totals is not None:
        # Compose the summaries of the segments walked before.
        for j in range(segment):
            row = (batch * segments + j) * d
            decay = tl.exp2(a * load_channels(elapsed + row, channels, inside)[:, :, :, None])
            kept = tl.where(g == 0.0, 0.0, decay * g)
            if PACKED:
                kept = tl.where(passes(starts, ends, j, segments, length, True), kept, 0.0)
            g = kept + load_lanes(totals + row * n, channels, inside, vary(one, j), d, n, N)
    high = min(begin + length, L)
    while high > begin:
        low = (high - 1) // EVERY * EVERY
        step = vary(one, low)
        if PACKED:
            state = tl.load(owners + high - 1).to(tl.int64) * d * n
            start = tl.load(starts + high - 1)
            if tl.load(ends + high - 1) == high:
                if dh is None:
                    g = tl.zeros_like(g)
                else:
                    g = load_lanes(dh + state, channels, inside, n * step, step, n, N)
        entering = saved + tl.cast(low // EVERY, tl.int64) * n * d
        if PACKED:
            if start >= low:
                h = load_lanes(h0 + state, channels, inside, n * step, step, n, N)
            else:
                h = load_lanes(entering, channels, inside, step, d, n, N)
            low = max(start, low)
        else:
            h = load_lanes(entering, channels, inside, step, d, n, N)
        first = low // 4 * 4
        last = (high - 1) // 4 * 4
        # What one lane writes to the scratch another may read; it must not be overwritten before.
        tl.debug_barrier()
        next_x = load_steps(x, x_step, first, low, high, channels, one, inside)
        next_dt = load_steps(dt, dt_step, first, low, high, channels, one, inside)
        next_b = load_state_rows(BC, first, low, high, PACKED, N, C)
        for t in range(first, last + 4, 4):
            xs = next_x
            dts = next_dt
            bs = next_b
            # layout: rows of B before the next tile of x, since loads return in the order in which they were asked for.
            next_b = load_state_rows(BC, min(t + 4, last), low, high, PACKED, N, C)
            next_x = load_steps(x, x_step, t + 4, low, high, channels, one, inside)
            next_dt = load_steps(dt, dt_step, t + 4, low, high, channels, one, inside)
            store_lanes(scratch + (t - first) // 4 * SIZE, own, own >= 0, N, 1, N, N, h)
            h = _again(xs, dts, bs, h, a, bias, t, low, high, SOFTPLUS, PACKED, N)
        tl.debug_barrier()
        next_x = load_steps(x, x_step, last, low, high, channels, one, inside)
        next_dt = load_steps(dt, dt_step, last, low, high, channels, one, inside)
        next_dy = load_steps(dy, dy_step, last, low, high, channels, one, inside)
        next_z = None
        if z is not None:
            next_z = load_steps(z, direction * z_time, last, low, high, channels, one, inside)
        next_h = load_lanes(scratch + (last - first) // 4 * SIZE, own, own >= 0, N, 1, N, N)
        next_b = load_state_rows(BC, last, low, high, PACKED, N, C)
        for back in range(0, last - first + 4, 4):
            t = last - back
            bs = next_b
            # layout: rows of B and C before the next tiles, as above.
            cs = load_state_rows(BC + N, t, low, high, PACKED, N, C)
            next_b = load_state_rows(BC, max(t - 4, first), low, high, PACKED, N, C)
            xs = next_x
            dts = next_dt
            dys = next_dy
            zs = next_z
            h = next_h
            next_x = load_steps(x, x_step, t - 4, low, high, channels, one, inside)
            next_dt = load_steps(dt, dt_step, t - 4, low, high, channels, one, inside)
            next_dy = load_steps(dy, dy_step, t - 4, low, high, channels, one, inside)
            if z is not None:
                next_z = load_steps(z, direction * z_time, t - 4, low, high, channels, one, inside)
            next_h = load_lanes(scratch + max(t - 4 - first, 0) // 4 * SIZE, own, own >= 0, N, 1, N, N)
            to = None if sums is None else sums + (t - first) * (2 * N)
            g, dA_sum, dD_sum, dbias = _tile(
                xs, dts, zs, dys, bs, cs, D, z, dx, ddt, dz, to,
                h, g, dA_sum, dD_sum, dbias, a, skip, bias,
                direction * d, t, low, high, one, channels, inside,
                SOFTPLUS, PACKED, N, CL, KEPT, EVERY,
            )  # fmt: skip
        if partial is not None:
            tl.debug_barrier()
            _add_sums(sums, partial, first, low, high, N, KEPT, EVERY)
        # Two conditions, not one: the first is settled at compile time.
        if PACKED and dh0 is not None:  # noqa: SIM102
            if start == low:
                store_lanes(dh0 + state, channels, inside, n * step, step, n, N, g)
        high = low
    if dh0 is not None and not PACKED:  # noqa: SIM102
        if begin == 0:
            store_lanes(dh0 + batch * d * n, channels, inside, n * one, one, n, N, g)
    row = batch * segments + segment
    if parts is not None:
        # Those of A, of D and of dt_bias.
        parts += row * (n + 2) * d
        store_lanes(parts, channels, inside, n * one, one, n, N, dA_sum)
        if D is not None:
            tl.store(parts + n * d + channels, tl.sum(dD_sum, 2), mask=inside)
        if dt_bias is not None:
            tl.store(parts + (n + 1) * d + channels, tl.sum(dbias, 2), mask=inside)


def backward(
    inputs: Inputs,
    saved: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    options: Options,
    needs: Sequence[bool],
    *,
    enter: Enter | None = None,
) -> Sequence[Tensor | None]:
    """The gradients. Of a stretch of a longer sequence ``enter`` makes dh, from what the stretch does to it."""
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, reverse = options
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias = gradients = room(inputs[:8], needs)
    dh0 = state_room(h0, dh, needs[8], passes=sequence is not None or l == 0)
    if x.numel() == 0:
        return [*(t if t is None else t.zero_() for t in gradients), dh0]
    x, dt, z, dy = (channels_last(t) for t in (x, dt, z, dy))
    D, dt_bias, h0, dh = (t if t is None else t.contiguous() for t in (D, dt_bias, h0, dh))
    config = backward_config(n)
    N, BD = config.states, config.BD
    plan = cover(batch, l, d, groups, config, SPAN)
    runs = runs_of(sequence, reverse)
    whole = enter is not None
    elapsed, totals = summarise(dy, dt, A, C, z, dt_bias, dh, runs, softplus, reverse, True, plan, whole)
    pending = None if enter is None else enter(stretches(elapsed, totals, A))

    # As many batch rows at once as fill the device: they share the scratch, and the sums of dB and dC over channels.
    walkers = groups * plan.blocks
    at_once = min(max(config.resident // (walkers * plan.segments), 1), batch)
    steps = -(-l // 4) * 4
    sums = bool(needs[2] or needs[5] or needs[7])
    # In one piece of memory: B and C; the sums of dB and dC of each program; the scratch; of each segment the sums for
    # A, D and dt_bias.
    lengths = (
        batch * groups * steps * 2 * N,
        at_once * walkers * steps * 2 * N if needs[3] or needs[4] else 0,
        at_once * walkers * plan.segments * (config.kept * SPAN * 2 * N + SPAN // 4 * N * BD),
        batch * plan.segments * (n + 2) * d if sums else 0,
    )
    BC, sums_BC, scratch, sums_A = x.new_empty(sum(lengths), dtype=torch.float32).split(lengths)
    BC = BC.view(batch, groups, steps, 2, N)
    partial = sums_BC.view(at_once, groups, plan.blocks, -1) if lengths[1] else None
    parts = sums_A.view(batch * plan.segments, (n + 2) * d) if sums else None
    rates = rates_of(A, N)
    interleave(B, C, BC, N, reverse)
    if pending is not None:
        dh = pending()
    for begin in range(0, batch, at_once):
        part = slice(begin, begin + at_once) if at_once < batch else None
        count = min(at_once, batch - begin)
        x_, dt_, z_, dy_, BC_, saved_, elapsed_, totals_, dx_, ddt_, dz_, dB_, dC_ = rows(
            part, x, dt, z, dy, BC, saved, elapsed, totals, dx, ddt, dz, dB, dC
        )
        # Packed sequences have one batch row, and many states.
        h0_, dh_, dh0_ = rows(part if sequence is None else None, h0, dh, dh0)
        (parts_,) = rows(slice(begin * plan.segments, None) if begin > 0 else None, parts)
        selective_scan_backward.launch(
            (count * walkers, plan.segments, 1),
            (x_, dt_, rates, BC_, D, z_, dt_bias, dy_, h0_, *runs, saved_, scratch, dh_, elapsed_, totals_)
            + (dx_, ddt_, dz_, parts_, partial, dh0_),
            (l, d, n, d // groups, plan.blocks, plan.length, plan.segments, 1)
            + (*batch_and_time(x, dt), *batch_and_time(z, dy)),
            (softplus, reverse, N, BD // config.repeats, config.repeats, config.channels, config.kept, SPAN),
            config.warps,
            config.registers,
        )
        if partial is not None:
            separate(partial, dB_, dC_, (count, l, groups, n), config, reverse)
    if parts is not None:
        sum_rows(parts, (n * d, d, d), (dA, dD, ddt_bias))
    return [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0]
