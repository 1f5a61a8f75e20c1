"""The walk of selective_scan, and the launcher of the forward.

A program walks over runs, stretches of one packed sequence, or over its whole segment as the only run. Tiles of 8 steps
start at multiples of 8; what of them is outside of the run has a step size of 0, which changes no state.

The same kernel summarises a segment as h -> exp(A·Σδ)·h + S, forward, and for the backward against the scan order,
where it carries exp(δ_t·A) times the gradient of h_t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E, sigmoid
from ssmscan.ops._triton.compose import Enter, Stretches
from ssmscan.ops._triton.cover import Cover
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import batch_and_time, channels_last
from ssmscan.ops.selective_scan.autograd import SPAN, Inputs, Options
from ssmscan.ops.selective_scan.configs import FORWARD, forward_tile
from ssmscan.ops.selective_scan.interleave import matrices
from ssmscan.ops.selective_scan.plan import batch_time_group, cover, runs_of
from ssmscan.ops.selective_scan.tile import (
    in_run,
    load_rows,
    load_states,
    step_sizes,
    store_rows,
    store_states,
    vary,
)


@triton.jit
def _tile(
    x, dt, B, C, D, z, y, h, elapsed, a, skip, bias,
    x_step, dt_step, B_step, C_step, z_step, y_step, t, low, high, n, channels, inside, states,
    SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Walk those of the 8 steps from position t that are in the run from low to high; ADJOINT from the last one."""
    position = tl.cast(t, tl.int64)
    row = tl.arange(0, 8)
    exists = in_run(t + row, low, high, PACKED)
    row = row.to(tl.int64)
    xs = load_rows(x + position * x_step, row * x_step, exists, channels, inside)
    dts = load_rows(dt + position * dt_step, row * dt_step, exists, channels, inside)
    Bs = load_rows(B + position * B_step, row * B_step, exists, states, states < n)
    if not SUMMARY:
        Cs = load_rows(C + position * C_step, row * C_step, exists, states, states < n)
    if z is not None:
        zs = load_rows(z + position * z_step, row * z_step, exists, channels, inside)
    deltas = step_sizes(dts, bias, t, low, high, SOFTPLUS, PACKED)
    ys = ()
    # layout: a step's exponentials stand before the one that waits for the last step's; the compiler keeps the order.
    soon = tl.exp2(a * deltas[7 if ADJOINT else 0][None, :])
    for i in tl.static_range(7 if ADJOINT else 0, -1 if ADJOINT else 8, -1 if ADJOINT else 1):
        decay = soon
        if i != (0 if ADJOINT else 7):
            soon = tl.exp2(a * deltas[i - 1 if ADJOINT else i + 1][None, :])
        u = xs[i].to(tl.float32)
        if ADJOINT:
            if z is not None:
                v = zs[i].to(tl.float32)
                u *= v * sigmoid(v)
            h = decay * (h + Bs[i].to(tl.float32)[:, None] * u[None, :])
        else:
            h = decay * h + Bs[i].to(tl.float32)[:, None] * (deltas[i] * u)[None, :]
        elapsed += deltas[i]
        if not SUMMARY:
            out = tl.sum(Cs[i].to(tl.float32)[:, None] * h, 0)
            if D is not None:
                out += skip * u
            if z is not None:
                v = zs[i].to(tl.float32)
                out *= v * sigmoid(v)
            ys = ys + (out,)
    if not SUMMARY:
        store_rows(y + position * y_step, row * y_step, exists, channels, inside, ys)
    return h, elapsed


@triton.jit
def _run(
    x, dt, B, C, D, z, y, saved, h, elapsed, a, skip, bias,
    x_step, dt_step, B_step, C_step, z_step, y_step, low, high, n, d, one, channels, inside, states,
    SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, PACKED: tl.constexpr, EVERY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Walk from position low to high; save the states before every EVERY-th position."""
    begin = low // 8 * 8
    for done in tl.range(0, high - begin, 8, num_stages=STAGES):
        t = begin + (high - 1 - begin) // 8 * 8 - done if ADJOINT else begin + done
        # Two conditions, not one, here and below: the first is settled at compile time.
        if saved is not None:  # noqa: SIM102
            if (t % EVERY == 0) & (t >= low):
                step = vary(one, t)
                store_states(saved + tl.cast(t // EVERY, tl.int64) * n * d, channels, inside, step, states, d, n, h)
        h, elapsed = _tile(
            x, dt, B, C, D, z, y, h, elapsed, a, skip, bias,
            x_step, dt_step, B_step, C_step, z_step, y_step, t, low, high, n, channels, inside, states,
            SOFTPLUS, ADJOINT, SUMMARY, PACKED,
        )  # fmt: skip
    return h, elapsed


@triton.jit
def passes(starts, ends, j, segments, length, ADJOINT: tl.constexpr):
    """Whether the j-th segment of the walk lies in one packed sequence; else it forgets what enters it.

    Whatever its decay: 0·NaN is not 0.
    """
    if ADJOINT:
        begin = (segments - 1 - j) * length
        through = tl.load(ends + begin) > begin + length
    else:
        begin = j * length
        through = tl.load(starts + begin + length - 1) < begin
    return through


@kernel(do_not_specialize=["L", "n", "one", "length", "segments", "A_channel", "A_state"])
def selective_scan_walk(
    # read
    x, dt, A, B, C, D, z, dt_bias, h0, owners, starts, ends,
    # written
    y, hn, saved,
    # written by a SUMMARY, else read
    elapsed, totals,
    # sizes, and a 1 that the compiler must not know
    L, d, n, per_group, blocks, length, segments, one,
    # strides
    A_channel, A_state,
    x_batch, x_time, dt_batch, dt_time, B_batch, B_time, B_group, C_batch, C_time, C_group, z_batch, z_time,
    # constants
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr,
    N: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h = exp(δ·A)·h + δ·B·x, y = C·h + D·x, gated by z, over one segment of the sequence, or the segment's SUMMARY.

    ADJOINT: x is the gradient of y, B is C, h0 the gradient of the final state, and segments count against the scan.
    """
    groups = d // per_group
    group = tl.program_id(0) // blocks % groups
    within = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = within < per_group
    channels = group * per_group + within
    states = tl.arange(0, N)
    segment = tl.program_id(1)
    batch = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    begin = (segments - 1 - segment if ADJOINT else segment) * length
    end = min(begin + length, L)

    # Positions count in scan order; a reversed scan starts at the last token and takes negative steps.
    origin = tl.cast(L - 1 if REVERSE else 0, tl.int64)
    direction = -1 if REVERSE else 1
    x += batch * x_batch + origin * x_time
    dt += batch * dt_batch + origin * dt_time
    B += batch * B_batch + origin * B_time + group.to(tl.int64) * B_group
    if not SUMMARY:
        C += batch * C_batch + origin * C_time + group.to(tl.int64) * C_group
        y += (batch * L + origin) * d
    if z is not None:
        z += batch * z_batch + origin * z_time
    if saved is not None:
        saved += batch * tl.cdiv(L, EVERY) * n * d

    a = load_states(A, channels, inside, A_channel, states, A_state, n) * LOG2E
    skip = tl.zeros((BD,), tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros((N, BD), tl.float32)
    past = tl.zeros((BD,), tl.float32)
    if not SUMMARY:
        if h0 is not None and starts is None:
            h = load_states(h0 + batch * d * n, channels, inside, n * one, states, one, n)
        if totals is not None:
            # Compose the summaries of the segments walked before.
            for j in range(segment):
                row = (batch * segments + j) * d
                decay = tl.exp2(a * tl.load(elapsed + row + channels, mask=inside, other=0.0)[None, :])
                # A state of zero stays zero, though the decay of a system that grows overflows.
                kept = tl.where(h == 0.0, 0.0, decay * h)
                if starts is not None:
                    kept = tl.where(passes(starts, ends, j, segments, length, False), kept, 0.0)
                h = kept + load_states(totals + row * n, channels, inside, one, states, d, n)
    if starts is None:
        h, past = _run(
            x, dt, B, C, D, z, y, saved, h, past, a, skip, bias,
            direction * x_time, direction * dt_time, direction * B_time, direction * C_time, direction * z_time,
            direction * d, begin, end, n, d, one, channels, inside, states,
            SOFTPLUS, ADJOINT, SUMMARY, False, EVERY, STAGES,
        )  # fmt: skip
        if not SUMMARY:  # noqa: SIM102
            if end == L:
                store_states(hn + batch * d * n, channels, inside, n * one, states, one, n, h)
    else:
        # What is left of the segment lies between low and high.
        low = begin
        high = end
        while low < high:
            token = high - 1 if ADJOINT else low
            state = tl.load(owners + token).to(tl.int64) * d * n
            start = tl.load(starts + token)
            stop = tl.load(ends + token)
            step = vary(one, token)
            if (stop == high) if ADJOINT else (start == low):
                if h0 is None:
                    h = tl.zeros_like(h)
                else:
                    h = load_states(h0 + state, channels, inside, n * step, states, step, n)
            begin = max(start, low)
            end = min(stop, high)
            h, past = _run(
                x, dt, B, C, D, z, y, saved, h, past, a, skip, bias,
                direction * x_time, direction * dt_time, direction * B_time, direction * C_time, direction * z_time,
                direction * d, begin, end, n, d, one, channels, inside, states,
                SOFTPLUS, ADJOINT, SUMMARY, True, EVERY, STAGES,
            )  # fmt: skip
            if not SUMMARY:  # noqa: SIM102
                if stop == end:
                    store_states(hn + state, channels, inside, n * step, states, step, n, h)
            if ADJOINT:
                high = begin
            else:
                low = end

    if SUMMARY:
        row = batch * segments + segment
        tl.store(elapsed + row * d + channels, past, mask=inside)
        store_states(totals + row * d * n, channels, inside, one, states, d, n, h)


def summarise(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    runs: tuple[Tensor | None, Tensor | None, Tensor | None],
    softplus: bool,
    reverse: bool,
    adjoint: bool,
    plan: Cover,
    whole: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """For each segment of ``plan`` Σδ, (b, segments, d), and the state that it adds, (b, segments, n, d).

    Nothing of the walk enters after the last segment, so it needs no summary, unless the ``whole`` is asked for.
    """
    segments = plan.segments if whole else plan.segments - 1
    if segments == 0:
        return None, None
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    elapsed = x.new_empty(batch, plan.segments, d, dtype=torch.float32)
    totals = x.new_empty(batch, plan.segments, n, d, dtype=torch.float32)
    blocks = cover(batch, l, d, groups, FORWARD, 8).blocks
    N, warps = forward_tile(n)
    selective_scan_walk.launch(
        (batch * groups * blocks, segments, 1),
        (x, dt, A, B, None, None, z, dt_bias, h0, *runs, None, None, None, elapsed, totals),
        (l, d, n, d // groups, blocks, plan.length, plan.segments, 1, *A.stride())
        + (*batch_and_time(x, dt), *batch_time_group(B), 0, 0, 0, *batch_and_time(z)),
        (softplus, reverse, adjoint, True, N, FORWARD.BD, SPAN, FORWARD.stages),
        warps,
    )
    return elapsed, totals


def stretches(elapsed: Tensor | None, totals: Tensor | None, A: Tensor) -> Stretches:
    """The summaries of whole segments, as others compose them."""
    assert elapsed is not None
    assert totals is not None
    return Stretches(elapsed.transpose(0, 1), totals.transpose(0, 1).mT, A)


def forward(
    inputs: Inputs, options: Options, save: bool = False, *, enter: Enter | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state, and with ``save`` the state before every SPAN-th step.

    Of a stretch of a longer sequence ``enter`` makes h0, from what the stretch does to it.
    """
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, reverse = options
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    y = x.new_empty(batch, l, d)
    # Packed: an empty sequence keeps its initial state, the kernel writes the others.
    hn = x.new_empty(batch, d, n, dtype=torch.float32) if sequence is None else h0.to(torch.float32, copy=True)
    saved = x.new_empty(batch, -(-l // SPAN), n, d, dtype=torch.float32) if save else None
    if batch * d == 0:
        return y, hn, saved
    x, dt, z = channels_last(x), channels_last(dt), channels_last(z)
    B, C = matrices(B, C)
    D, dt_bias, h0 = (t if t is None else t.contiguous() for t in (D, dt_bias, h0))
    runs = runs_of(sequence, reverse)
    plan = cover(batch, l, d, groups, FORWARD, 8)
    N, warps = forward_tile(n)
    whole = enter is not None
    elapsed, totals = summarise(x, dt, A, B, None, dt_bias, h0, runs, softplus, reverse, False, plan, whole)
    if enter is not None:
        h0 = enter(stretches(elapsed, totals, A))()
    selective_scan_walk.launch(
        (batch * groups * plan.blocks, plan.segments, 1),
        (x, dt, A, B, C, D, z, dt_bias, h0, *runs, y, hn, saved, elapsed, totals),
        (l, d, n, d // groups, plan.blocks, plan.length, plan.segments, 1, *A.stride())
        + (*batch_and_time(x, dt), *batch_time_group(B, C), *batch_and_time(z)),
        (softplus, reverse, False, False, N, FORWARD.BD, SPAN, FORWARD.stages),
        warps,
    )
    return y, hn, saved
