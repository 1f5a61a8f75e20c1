"""The backward of selective_scan, and its launcher: every gradient in one walk against the scan order.

With g_t the gradient of h_t, dy the output's (times silu(z)) and e_t = exp(δ_t·A):

    g_t = C_t·dy_t + e_{t+1}·g_{t+1},    dC = Σ_d dy·h,    dB = Σ_d g·δ·x,    dx = D·dy + δ·(g·B),
    q_t = g_t·e_t·h_{t-1},    dA = Σ_t δ·q,    dδ = x·(g·B) + Σ_n A·q

For each run, a stretch of at most SPAN steps between two saved states, a first pass recomputes the states and keeps
some of them in memory, a scratch that stays in the cache. The second pass goes back over the HELD steps after each of
these, whose states and decays it holds in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import batch_and_time, channels_last
from ssmscan.ops.selective_scan.autograd import SPAN
from ssmscan.ops.selective_scan.configs import BACKWARD, BACKWARD_MANY_STATES, STATES
from ssmscan.ops.selective_scan.kernel_fwd import enter_segment, summarise
from ssmscan.ops.selective_scan.plan import batch_time_group, cover, matrix, runs_of
from ssmscan.ops.selective_scan.tile import (
    LN2,
    in_run,
    load_rows,
    load_states,
    sigmoid,
    stack,
    step_sizes,
    store_rows,
    store_states,
    sum_channels,
    vary,
)


@triton.jit
def _again(
    x, dt, B, scratch, h, a, bias, x_step, dt_step, B_step, t, low, high, n, one, channels, inside, states,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Walk the 8 steps from position t, keeping the state before every HELD-th; the state after them."""
    position = tl.cast(t, tl.int64)
    row = tl.arange(0, 8)
    exists = in_run(t + row, low, high, PACKED)
    row = row.to(tl.int64)
    xs = load_rows(x + position * x_step, row * x_step, exists, channels, inside)
    dts = load_rows(dt + position * dt_step, row * dt_step, exists, channels, inside)
    Bs = load_rows(B + position * B_step, row * B_step, exists, states, states < n)
    deltas = step_sizes(dts, bias, t, low, high, SOFTPLUS, PACKED)
    lane = tl.arange(0, BD)
    for i in tl.static_range(8):
        if i % HELD == 0:
            to = scratch + i // HELD * N * BD
            store_states(to, lane, lane < BD, vary(one, t), states, BD, N, h)
        u = deltas[i] * xs[i].to(tl.float32)
        h = tl.exp2(a * deltas[i][None, :]) * h + Bs[i].to(tl.float32)[:, None] * u[None, :]
    return h


@triton.jit
def _tile(
    x, dt, B, C, D, z, dy, scratch, dx, ddt, dz, partial, g, dA, dD, dbias, a, skip, bias,
    x_step, dt_step, B_step, C_step, z_step, dy_step, direction, t, low, high, d, n, one, channels, inside, states,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Walk back over the 8 steps from position t, HELD of them at a time."""
    position = tl.cast(t, tl.int64)
    row = tl.arange(0, 8)
    exists = in_run(t + row, low, high, PACKED)
    row = row.to(tl.int64)
    xs = load_rows(x + position * x_step, row * x_step, exists, channels, inside)
    dts = load_rows(dt + position * dt_step, row * dt_step, exists, channels, inside)
    dys = load_rows(dy + position * dy_step, row * dy_step, exists, channels, inside)
    if z is not None:
        zs = load_rows(z + position * z_step, row * z_step, exists, channels, inside)
    Bs = load_rows(B + position * B_step, row * B_step, exists, states, states < n)
    Cs = load_rows(C + position * C_step, row * C_step, exists, states, states < n)
    deltas = step_sizes(dts, bias, t, low, high, SOFTPLUS, PACKED)
    lane = tl.arange(0, BD)
    # The walk goes backward, so the rows are gathered from the front.
    dxs = ()
    ddts = ()
    dzs = ()
    sums = ()
    for first in tl.static_range(8 - HELD, -1, -HELD):
        # The states before and after each step, and its decay.
        h = load_states(scratch + first // HELD * N * BD, lane, lane < BD, vary(one, t), states, BD, N)
        hs = (h,)
        decays = ()
        for i in tl.static_range(first, first + HELD):
            decay = tl.exp2(a * deltas[i][None, :])
            u = deltas[i] * xs[i].to(tl.float32)
            h = decay * h + Bs[i].to(tl.float32)[:, None] * u[None, :]
            decays = decays + (decay,)
            hs = hs + (h,)
        for i in tl.static_range(first + HELD - 1, first - 1, -1):
            before = hs[i - first]
            after = hs[i - first + 1]
            delta = deltas[i]
            v = xs[i].to(tl.float32)
            w = dys[i].to(tl.float32)
            b = Bs[i].to(tl.float32)[:, None]
            c = Cs[i].to(tl.float32)[:, None]
            exists_i = in_run(t + i, low, high, PACKED)
            if z is not None:
                gate = zs[i].to(tl.float32)
                opened = sigmoid(gate)
                out = tl.sum(c * after, 0)
                if D is not None:
                    out += skip * v
                dzs = (w * out * opened * (1.0 + gate * (1.0 - opened)),) + dzs
                w *= gate * opened
            g += c * w[None, :]
            if partial is not None:
                p = g * (delta * v)[None, :]
                q = after * w[None, :]
                if N == 16:
                    sums = (sum_channels(p, q, BD),) + sums
                else:
                    to = partial + (position + i) * direction * (2 * N) + 2 * states
                    tl.store(to, tl.sum(p, 1), mask=(states < N) & exists_i)
                    tl.store(to + 1, tl.sum(q, 1), mask=(states < N) & exists_i)
            du = tl.sum(g * b, 0)
            g *= decays[i - first]
            q = g * before
            dA += q * delta[None, :]
            step = v * du + LN2 * tl.sum(q * a, 0)
            if SOFTPLUS:
                step *= sigmoid(dts[i].to(tl.float32) + bias)
            step = tl.where(exists_i, step, 0.0)
            into = delta * du
            if D is not None:
                into += skip * w
            dD += w * v
            dbias += step
            dxs = (into,) + dxs
            ddts = (step,) + ddts
    if dx is not None:
        store_rows(dx + position * direction * d, row * direction * d, exists, channels, inside, dxs)
    if ddt is not None:
        store_rows(ddt + position * direction * d, row * direction * d, exists, channels, inside, ddts)
    if dz is not None:
        store_rows(dz + position * direction * d, row * direction * d, exists, channels, inside, dzs)
    if partial is not None and N == 16:
        # Lanes 2j and 2j + 1 of every 32 hold the sums of state j of B and of C.
        total = tl.sum(tl.reshape(stack(sums), [8, BD // 32, 32]), 1)
        time = (position + row) * direction
        tl.store(partial + (time[:, None] * 32 + tl.arange(0, 32)[None, :]), total, mask=exists[:, None])
    return g, dA, dD, dbias


@kernel(do_not_specialize=["L", "n", "one", "length", "segments", "A_channel", "A_state"])
def selective_scan_backward(
    x, dt, A, B, C, D, z, dt_bias, dy, h0, owners, starts, ends, saved, scratch, dh, elapsed, totals,
    dx, ddt, dz, dA, partial, dD, ddt_bias, dh0,
    L, d, n, per_group, blocks, length, segments, one, A_channel, A_state,
    x_batch, x_time, dt_batch, dt_time, B_batch, B_time, B_group, C_batch, C_time, C_group, z_batch, z_time,
    dy_batch, dy_time,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    N: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients over one segment, of a multiple of EVERY steps; segments count against the scan."""
    PACKED: tl.constexpr = starts is not None
    groups = d // per_group
    walker = tl.program_id(0)
    group = walker // blocks % groups
    within = walker % blocks * BD + tl.arange(0, BD)
    inside = within < per_group
    channels = group * per_group + within
    states = tl.arange(0, N)
    segment = tl.program_id(1)
    batch = (walker // (blocks * groups)).to(tl.int64)
    begin = (segments - 1 - segment) * length

    origin = tl.cast(L - 1 if REVERSE else 0, tl.int64)
    direction = -1 if REVERSE else 1
    x += batch * x_batch + origin * x_time
    dt += batch * dt_batch + origin * dt_time
    B += batch * B_batch + origin * B_time + group.to(tl.int64) * B_group
    C += batch * C_batch + origin * C_time + group.to(tl.int64) * C_group
    dy += batch * dy_batch + origin * dy_time
    saved += batch * tl.cdiv(L, EVERY) * n * d
    scratch += (walker.to(tl.int64) * segments + segment) * (EVERY // HELD) * N * BD
    out = (batch * L + origin) * d
    if z is not None:
        z += batch * z_batch + origin * z_time
    if dx is not None:
        dx += out
    if ddt is not None:
        ddt += out
    if dz is not None:
        dz += out
    if partial is not None:
        partial += (walker.to(tl.int64) * L + origin) * (2 * N)

    a = load_states(A, channels, inside, A_channel, states, A_state, n) * LOG2E
    skip = tl.zeros((BD,), tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
    g = tl.zeros((N, BD), tl.float32)
    dA_sum = tl.zeros((N, BD), tl.float32)
    dD_sum = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    if dh is not None and not PACKED:
        g = load_states(dh + batch * d * n, channels, inside, n * one, states, one, n)
    if totals is not None:
        row = batch * segments * d
        g = enter_segment(
            g, a, elapsed + row, totals + row * n, starts, ends, segment, segments, length, d, n, one,
            channels, inside, states, True,
        )  # fmt: skip
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
                    g = load_states(dh + state, channels, inside, n * step, states, step, n)
        entering = saved + tl.cast(low // EVERY, tl.int64) * n * d
        if PACKED:
            if start >= low:
                h = load_states(h0 + state, channels, inside, n * step, states, step, n)
            else:
                h = load_states(entering, channels, inside, step, states, d, n)
            low = max(start, low)
        else:
            h = load_states(entering, channels, inside, step, states, d, n)
        first = low // 8 * 8
        count = (high - first + 7) // 8
        # What one lane writes to the scratch another may read; it must not be overwritten before.
        tl.debug_barrier()
        for k in tl.range(0, count, num_stages=STAGES):
            h = _again(
                x, dt, B, scratch + k * (8 // HELD * N * BD), h, a, bias,
                direction * x_time, direction * dt_time, direction * B_time, first + k * 8, low, high, n, one,
                channels, inside, states, SOFTPLUS, PACKED, N, BD, HELD,
            )  # fmt: skip
        tl.debug_barrier()
        for done in tl.range(0, count, num_stages=STAGES):
            k = count - 1 - done
            g, dA_sum, dD_sum, dbias = _tile(
                x, dt, B, C, D, z, dy, scratch + k * (8 // HELD * N * BD), dx, ddt, dz, partial,
                g, dA_sum, dD_sum, dbias, a, skip, bias,
                direction * x_time, direction * dt_time, direction * B_time, direction * C_time, direction * z_time,
                direction * dy_time, direction, first + k * 8, low, high, d, n, one, channels, inside, states,
                SOFTPLUS, PACKED, N, BD, HELD,
            )  # fmt: skip
        # Two conditions, not one: the first is settled at compile time.
        if PACKED and dh0 is not None:  # noqa: SIM102
            if start == low:
                store_states(dh0 + state, channels, inside, n * step, states, step, n, g)
        high = low
    if dh0 is not None and not PACKED:  # noqa: SIM102
        if begin == 0:
            store_states(dh0 + batch * d * n, channels, inside, n * one, states, one, n, g)
    row = batch * segments + segment
    if dA is not None:
        store_states(dA + row * d * n, channels, inside, n * one, states, one, n, dA_sum)
    if dD is not None:
        tl.store(dD + row * d + channels, dD_sum, mask=inside)
    if ddt_bias is not None:
        tl.store(ddt_bias + row * d + channels, dbias, mask=inside)


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    softplus: bool,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, dt, A, B, C, D, z, dt_bias where ``needs`` says so, empty otherwise, and of h0 if given."""
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    dh0 = x.new_empty((0, *A.shape) if h0 is None else h0.shape, dtype=torch.float32)
    if sequence is not None:
        # The state of an empty sequence passes through; the kernel writes the others.
        dh0.copy_(dh) if dh is not None else dh0.zero_()
    if batch * d * l == 0:
        if sequence is None and h0 is not None:
            dh0.copy_(dh) if dh is not None else dh0.zero_()
        empty = (
            x.new_empty(0) if t is None or not need else t.new_zeros(t.shape)
            for t, need in zip(inputs, needs, strict=True)
        )
        return *empty, dh0
    x, dt, z, dy = (channels_last(t) for t in (x, dt, z, dy))
    B, C = matrix(B), matrix(C)
    D, dt_bias, h0, dh = (t if t is None else t.contiguous() for t in (D, dt_bias, h0, dh))
    config = BACKWARD if n <= STATES else BACKWARD_MANY_STATES
    plan = cover(batch, l, d, n, groups, config, SPAN)
    runs = runs_of(sequence, reverse)
    elapsed, totals = summarise(dy, dt, A, C, z, dt_bias, dh, runs, softplus, reverse, True, plan)

    def float32(need: bool, *shape: int) -> Tensor | None:
        return x.new_empty(shape, dtype=torch.float32) if need else None

    def like(t: Tensor | None, need: bool) -> Tensor | None:
        return t.new_empty(batch, l, d) if t is not None and need else None

    rows = batch * plan.segments
    dx, ddt, dz = like(x, needs[0]), like(dt, needs[1]), like(z, needs[6])
    dA, dD = float32(needs[2], rows, d, n), float32(needs[5] and D is not None, rows, d)
    ddt_bias = float32(needs[7] and dt_bias is not None, rows, d)
    partial = float32(needs[3] or needs[4], batch, groups, plan.blocks, l, plan.N, 2)
    scratch = x.new_empty(rows * groups * plan.blocks * (SPAN // config.held) * plan.N * config.BD, dtype=torch.float32)
    selective_scan_backward.launch(
        (batch * groups * plan.blocks, plan.segments, 1),
        (x, dt, A, B, C, D, z, dt_bias, dy, h0, *runs, saved, scratch, dh, elapsed, totals)
        + (dx, ddt, dz, dA, partial, dD, ddt_bias, None if h0 is None else dh0),
        (l, d, n, d // groups, plan.blocks, plan.length, plan.segments, 1, *A.stride())
        + (*batch_and_time(x, dt), *batch_time_group(B, C), *batch_and_time(z, dy)),
        (softplus, reverse, plan.N, config.BD, SPAN, config.held, config.stages),
        plan.warps,
    )
    gradients = [dx, ddt, dA, None, None, dD, dz, ddt_bias]
    if partial is not None:
        both = partial.sum(2) if plan.blocks > 1 else partial[:, :, 0]
        gradients[3:5] = (both[..., :n, j].transpose(1, 2) if needs[3 + j] else None for j in (0, 1))
    for i in (2, 5, 7):
        parts = gradients[i]
        gradients[i] = None if parts is None else parts.sum(0)
    for i in (2, 3, 4, 5, 7):
        total, t = gradients[i], inputs[i]
        if total is not None and t is not None:
            gradients[i] = t.new_empty(t.shape).copy_(total)
    return *(x.new_empty(0) if gradient is None else gradient for gradient in gradients), dh0
