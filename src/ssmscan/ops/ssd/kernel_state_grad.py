"""What the states between chunks give to the gradients of ssd, all chunks in parallel; and the launcher.

With h the state that enters a chunk and g the adjoint of the one that leaves it, e_i the decay from the chunk's begin
to token i and l_j that from j to its end:

    dx_j = Δ_j l_j g B_j,    dB_j = Δ_j l_j x_j g,    dC_i = e_i dy_i h,

and what flows over the decays of the chunk: from h into each token, from each token into g, and from h into g. A
program takes a chunk and some heads of one group, whose dB and dC it sums in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import state_gradient_config
from ssmscan.ops.ssd.kernel_grad import Chunks
from ssmscan.ops.ssd.step_sizes import StateFlows
from ssmscan.ops.ssd.tiles import below, decays, followed, heads_of, load_tile, store_tile, tokens_of


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over the first and the second half of the columns, [ROWS, 2]."""
    # layout: each half lies in warps of its own, so no sum goes across warps.
    return tl.sum(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), 2)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_state_gradients(
    # read
    x, dy, B, C, added, table, weights, sums, states, adjoints,
    # written
    dx, dB, dC, into, onward, through,
    # sizes
    L, H, P, chunks,
    # strides: between both sums, between scans, and of tensors; those along the time are constants
    part, steps_scan, sums_scan, states_scan,
    x_batch, x_head, dy_batch, dy_head, B_batch, B_group, C_batch, C_group, totals_split,
    x_time: tl.constexpr, dy_time: tl.constexpr, B_time: tl.constexpr, C_time: tl.constexpr, out_time: tl.constexpr,
    dx_time: tl.constexpr,
    # what is taken
    SCANS: tl.constexpr, PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr,
    FAR: tl.constexpr,
    # tiles
    PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of two SCANS the second goes the other way, and its chunks and their tokens are counted from the other end.

    SHIFT: the scan's own dy is that of the next token. What is ``added`` to dx may be its own memory.
    """
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = heads_of(PER_GROUP, HEADS)
    batch, chunk, first, count, q, rows, exists = tokens_of(table, chunks, L, Q, WHOLE, FAR)
    n = tl.arange(0, BN)
    B += batch * B_batch + first * B_time + group * B_group
    C += batch * C_batch + first * C_time + group * C_group
    Bs = load_tile(B, rows * B_time, n, exists, N, EVEN_N, DOT)
    Cs = load_tile(C, rows * C_time, n, exists, N, EVEN_N, DOT)
    x += batch * x_batch + first * x_time
    dy += batch * dy_batch + first * dy_time
    shown = followed(table, chunk, chunks, first, count, q, L) if SHIFT else exists
    dx += batch * L * H * P + first * dx_time
    if added is not None:
        added += batch * L * H * P + first * dx_time
    dBs = tl.zeros((Q, BN), tl.float32)
    dCs = tl.zeros((Q, BN), tl.float32)
    diagonal = tl.arange(0, BP)[:, None] == tl.arange(0, BP)[None, :]
    half = tl.arange(0, 2)[None, :]
    # The part of dx of the first of two scans, whose channels are one block.
    others = tl.zeros((Q, BP), tl.float32)
    for i in tl.range(begin * SCANS, end * SCANS, num_stages=STAGES):
        head = i // SCANS
        wide = tl.cast(head, tl.int64)
        if SCANS == 1:
            scan = 0
            own = chunk
            token = q
        else:
            scan = tl.cast(i % SCANS, tl.int64)
            own = tl.where(scan == 0, chunk, chunks - 1 - chunk)
            token = tl.where(scan == 0, q, Q - 1 - q)
        row = (batch * H + wide) * chunks + own
        at = scan * steps_scan + row * Q
        _, entered, left, _ = decays(sums + (scan * sums_scan + row * Q), part, token, 1, PRECISE, Q, False)
        weight = tl.load(weights + at + token)
        arriving = tl.zeros((Q, 2), tl.float32)
        leaving = tl.zeros((Q, 2), tl.float32)
        flow = tl.zeros((BP, 2), tl.float32)
        for block in tl.range(BLOCKS, num_stages=1):
            p = block * BP + tl.arange(0, BP)
            inside = below(p, P, EVEN_P)
            kept = scan * states_scan + ((batch * chunks + own) * H + wide) * P * N
            dys = load_tile(dy + SHIFT * dy_time + wide * dy_head, rows * dy_time, p, shown, P, EVEN_P, DOT)
            hs = load_tile(states + kept, p * N, n, inside, N, EVEN_N, DOT)
            gs = load_tile(adjoints + kept, p * N, n, inside, N, EVEN_N, DOT)
            arrived = tl.dot(Cs, tl.trans(hs), input_precision=PRECISION)
            if PRECISE and BN > 128:
                # layout: again, since both do not fit into shared memory for as long as the program runs.
                Bs = load_tile(B, rows * B_time, n, exists, N, EVEN_N, DOT)
            dxs = tl.dot(Bs, tl.trans(gs), input_precision=PRECISION)
            # layout: the sum of h·g as a trace, for elementwise it takes more registers than there are.
            pairing = tl.dot(hs, tl.trans(gs), input_precision=PRECISION)
            # layout: loaded after the products without it; all loads first take a quarter longer.
            xs = load_tile(x + wide * x_head, rows * x_time, p, exists, P, EVEN_P, DOT)
            dCs = tl.dot((dys.to(tl.float32) * entered[:, None]).to(DOT), hs, dCs, input_precision=PRECISION)
            dBs = tl.dot((xs.to(tl.float32) * weight[:, None]).to(DOT), gs, dBs, input_precision=PRECISION)
            arriving += _halves(arrived * dys.to(tl.float32), Q, BP)
            leaving += _halves(dxs * xs.to(tl.float32), Q, BP)
            flow += _halves(tl.where(diagonal, pairing, 0.0), BP, BP)
            dxs *= weight[:, None]
            if SCANS == 1:
                if added is not None:
                    dxs += load_tile(added + wide * P, rows * dx_time, p, exists, P, EVEN_P, tl.float32)
                store_tile(dx + wide * P, rows * dx_time, p, dxs, exists, P, EVEN_P)
            else:
                dxs += others
                others = tl.where(scan == 0, dxs, 0.0)
                if scan == 1:
                    store_tile(dx + wide * P, rows * dx_time, p, dxs, exists, P, EVEN_P)
        two = at * 2 + (token[:, None] * 2 + half)
        tl.store(into + two, arriving * entered[:, None])
        tl.store(onward + two, leaving * left[:, None])
        # Each channel is in one of the halves.
        channel = tl.arange(0, BP)[:, None] + 0 * half
        tl.store(through + at // Q * BP + channel, flow, mask=half == channel // (BP // 2))
    totals = split * totals_split + (batch * L * (H // PER_GROUP) + group) * N + first * out_time
    store_tile(dB + totals, rows * out_time, n, dBs, exists, N, EVEN_N)
    store_tile(dC + totals, rows * out_time, n, dCs, exists, N, EVEN_N)


def state_gradients(chunks: Chunks, added: Tensor | None, states: Tensor, adjoints: Tensor, dx: Tensor) -> StateFlows:
    """Write the part of ``dx``, plus what is ``added``, which may be its memory, and those of dB and dC.

    Of two scans, which have their ``states`` and ``adjoints``, (scans, b, chunks, h, p, n), nothing can be added.
    """
    delta, weights, sums = chunks.steps
    into, onward = delta.new_empty(2, *delta.shape, 2)
    through = delta.new_empty(*delta.shape[:4], chunks.tiles.BP)
    dx = from_first(dx, 1, chunks.reverse)
    added = None if added is None else from_first(added, 1, chunks.reverse)
    config = state_gradient_config(chunks.tiles)
    ssd_state_gradients.launch(
        chunks.grid,
        (
            chunks.x, chunks.dy, chunks.B, chunks.C, added, chunks.table, weights, sums, states, adjoints, dx,
            *chunks.totals, into, onward, through,
        ),
        (*chunks.sizes, states.stride(0), *chunks.strides),
        (*chunks.constants, config.stages),
        config.warps,
    )  # fmt: skip
    return StateFlows(into, onward, through)
