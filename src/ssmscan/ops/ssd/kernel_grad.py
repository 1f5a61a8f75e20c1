"""The gradients of ssd in x, B and C, all chunks in parallel, from the states that enter them; and their launcher.

With h the state that enters a chunk and g the adjoint of the one that leaves it, w_ij the decay from token j to i,
e_i that from the chunk's begin to i and l_j that from j to its end:

    dx_j = Δ_j (Σ_i w_ij (C_i·B_j) dy_i + l_j g B_j),    dC_i = Σ_j w_ij Δ_j (dy_i·x_j) B_j + e_i dy_i h,
    dB_j = Δ_j (Σ_i w_ij (dy_i·x_j) C_i + l_j x_j g),    dlog_a_t = what flows from tokens before t to those from t on.

Two kernels share the work, for the registers' sake: one sums what dB and dC owe to the states, the other does the rest.
A program takes a chunk and some heads of one group, whose dB and dC it sums in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import Tiles, gradient_configs
from ssmscan.ops.ssd.kernel_steps import Flows, Steps, token_strides
from ssmscan.ops.ssd.tiles import below, decays, followed, load_tile, place, store_tile


@triton.jit
def _heads(PER_GROUP: tl.constexpr, HEADS: tl.constexpr):
    """This program's group, its part of the group's heads, and the first and end of those."""
    SPLITS: tl.constexpr = (PER_GROUP + HEADS - 1) // HEADS
    group = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    first = group * PER_GROUP + split * HEADS
    return group.to(tl.int64), split.to(tl.int64), first, min(first + HEADS, (group + 1) * PER_GROUP)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over the first and the second half of the columns, [ROWS, 2]: each half lies in warps of its own."""
    return tl.sum(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), 2)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_state_gradients(
    x, dy, C, table, weights, sums, states, adjoints, dB, dC, into, through,
    L, H, P, chunks, part, x_batch, x_head, dy_batch, dy_head, C_batch, C_group, totals_split,
    x_time: tl.constexpr, dy_time: tl.constexpr, C_time: tl.constexpr, out_time: tl.constexpr,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr,
    PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the states give to dB and dC, what flows from h into each token, and from h to g. SHIFT: as below."""
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = _heads(PER_GROUP, HEADS)
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    first, count = place(table, chunk, chunks, L, Q)
    exists = below(q, count, WHOLE)
    rows = q.to(tl.int64) if FAR else q
    Cs = load_tile(C + batch * C_batch + first * C_time + group * C_group, rows * C_time, n, exists, N, EVEN_N, DOT)
    x += batch * x_batch + first * x_time
    dy += batch * dy_batch + first * dy_time
    shown = followed(table, chunk, chunks, first, count, q, L) if SHIFT else exists
    dBs = tl.zeros((Q, BN), tl.float32)
    dCs = tl.zeros((Q, BN), tl.float32)
    diagonal = tl.arange(0, BP)[:, None] == tl.arange(0, BP)[None, :]
    half = tl.arange(0, 2)[None, :]
    for head in tl.range(begin, end, num_stages=STAGES):
        wide = tl.cast(head, tl.int64)
        row = (batch * H + wide) * chunks + chunk
        _, entered, _, _ = decays(sums + row * Q, part, q, 1, PRECISE, Q, False)
        left = tl.load(weights + row * Q + q)
        arriving = tl.zeros((Q, 2), tl.float32)
        flow = tl.zeros((BP, 2), tl.float32)
        for block in tl.range(BLOCKS, num_stages=1):
            p = block * BP + tl.arange(0, BP)
            inside = below(p, P, EVEN_P)
            kept = ((batch * chunks + chunk) * H + wide) * P * N
            dys = load_tile(dy + SHIFT * dy_time + wide * dy_head, rows * dy_time, p, shown, P, EVEN_P, DOT)
            hs = load_tile(states + kept, p * N, n, inside, N, EVEN_N, DOT)
            products = tl.dot(Cs, tl.trans(hs), input_precision=PRECISION) * dys.to(tl.float32)
            arriving += _halves(products, Q, BP)
            dCs = tl.dot((dys.to(tl.float32) * entered[:, None]).to(DOT), hs, dCs, input_precision=PRECISION)
            gs = load_tile(adjoints + kept, p * N, n, inside, N, EVEN_N, DOT)
            # The sum of h·g, as a trace: elementwise it takes more registers than there are.
            pairing = tl.dot(hs, tl.trans(gs), input_precision=PRECISION)
            flow += _halves(tl.where(diagonal, pairing, 0.0), BP, BP)
            xs = load_tile(x + wide * x_head, rows * x_time, p, exists, P, EVEN_P, DOT)
            dBs = tl.dot((xs.to(tl.float32) * left[:, None]).to(DOT), gs, dBs, input_precision=PRECISION)
        tl.store(into + row * Q * 2 + (q[:, None] * 2 + half), arriving * entered[:, None])
        # Each channel is in one of the halves.
        channel = tl.arange(0, BP)[:, None] + 0 * half
        tl.store(through + row * BP + channel, flow, mask=half == channel // (BP // 2))
    totals = split * totals_split + (batch * L * (H // PER_GROUP) + group) * N + first * out_time
    store_tile(dB + totals, rows * out_time, n, dBs, exists, N, EVEN_N)
    store_tile(dC + totals, rows * out_time, n, dCs, exists, N, EVEN_N)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_chunk_gradients(
    x, dy, B, C, D, table, deltas, sums, adjoints, added, dB, dC, dx, dD, tokens, skipped,
    L, H, P, chunks, part, x_batch, x_head, dy_batch, dy_head, B_batch, B_group, C_batch, C_group, D_head, D_p,
    totals_split,
    x_time: tl.constexpr, dy_time: tl.constexpr, B_time: tl.constexpr, C_time: tl.constexpr, out_time: tl.constexpr,
    dx_time: tl.constexpr, ELEMENTWISE: tl.constexpr,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr,
    PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All other gradients, and the sums of dB and dC. Of a pair of tokens the earlier one, j, is the row.

    What is ``added`` to dx may be its own memory. SHIFT: the scan's own dy is that of the next token. ELEMENTWISE: D
    is applied to each element, otherwise in the product of each token with itself.
    """
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = _heads(PER_GROUP, HEADS)
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    first, count = place(table, chunk, chunks, L, Q)
    exists = below(q, count, WHOLE)
    rows = q.to(tl.int64) if FAR else q
    Bs = load_tile(B + batch * B_batch + first * B_time + group * B_group, rows * B_time, n, exists, N, EVEN_N, DOT)
    C += batch * C_batch + first * C_time + group * C_group
    BC = tl.dot(Bs, tl.trans(load_tile(C, rows * C_time, n, exists, N, EVEN_N, DOT)), input_precision=PRECISION)
    x += batch * x_batch + first * x_time
    dy += batch * dy_batch + first * dy_time
    shown = followed(table, chunk, chunks, first, count, q, L) if SHIFT else exists
    dx += batch * L * H * P + first * dx_time
    if added is not None:
        added += batch * L * H * P + first * dx_time
    dBC = tl.zeros((Q, Q), tl.float32)
    diagonal = q[:, None] == q[None, :]
    after = (q[:, None] <= q[None, :]).to(tl.float32)
    for head in tl.range(begin, end, num_stages=STAGES):
        wide = tl.cast(head, tl.int64)
        row = (batch * H + wide) * chunks + chunk
        per_chunk = (batch * chunks + chunk) * H + wide
        pairs, _, left, _ = decays(sums + row * Q, part, q, 0, PRECISE, Q, False)
        delta = tl.load(deltas + row * Q + q)
        scores = BC * pairs * delta[:, None]
        # One number for a head costs nothing in the product of each token with itself.
        if D is not None and not ELEMENTWISE:
            scores += tl.where(diagonal, tl.load(D + head * D_head).to(tl.float32), 0.0)
        scores = scores.to(DOT)
        products = tl.zeros((Q, Q), tl.float32)
        onward = tl.zeros((Q,), tl.float32)
        past = tl.zeros((Q,), tl.float32)
        for block in tl.range(BLOCKS, num_stages=1):
            p = block * BP + tl.arange(0, BP)
            inside = below(p, P, EVEN_P)
            xs = load_tile(x + wide * x_head, rows * x_time, p, exists, P, EVEN_P, DOT)
            dys = load_tile(dy + SHIFT * dy_time + wide * dy_head, rows * dy_time, p, shown, P, EVEN_P, DOT)
            gs = load_tile(adjoints + per_chunk * P * N, p * N, n, inside, N, EVEN_N, DOT)
            dxs = tl.dot(Bs, tl.trans(gs), input_precision=PRECISION) * left[:, None]
            onward += tl.sum(dxs * xs.to(tl.float32), 1)
            dxs = tl.dot(scores, dys, dxs * delta[:, None], input_precision=PRECISION)
            if ELEMENTWISE:
                skip = tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32)
                direct = dys
                if SHIFT:
                    direct = load_tile(dy + wide * dy_head, rows * dy_time, p, exists, P, EVEN_P, DOT)
                dxs += direct.to(tl.float32) * skip[None, :]
                weighted = direct.to(tl.float32) * xs.to(tl.float32)
                if dD is not None:
                    tl.store(dD + per_chunk * P + p, tl.sum(weighted, 0), mask=p < P)
                elif SHIFT:
                    past += tl.sum(weighted, 1)
            if added is not None:
                dxs += load_tile(added + wide * P, rows * dx_time, p, exists, P, EVEN_P, tl.float32)
            store_tile(dx + wide * P, rows * dx_time, p, dxs, exists, P, EVEN_P)
            products = tl.dot(xs, tl.trans(dys), products, input_precision=PRECISION)
        if D is not None and not ELEMENTWISE:
            past = tl.sum(tl.where(diagonal, products, 0.0), 1)
        products *= pairs
        dBC += products * delta[:, None]
        products *= BC
        own = tl.sum(products, 1) + onward
        # Over decay t flows what comes from tokens before t to those from t on, and to the leaving state, as if to the
        # last token. Sums of just these: where the decay is 0 they are 0 too. Here t is the row. Not rounded to DOT:
        # the gradient of A is a sum of these, in which they may cancel.
        products += tl.where(q[None, :] == Q - 1, onward[:, None], 0.0)
        crossing = tl.dot(after, tl.trans(products * delta[:, None]), input_precision=PRECISION)
        crossing = tl.sum(tl.where(q[:, None] > q[None, :], crossing, 0.0), 1)
        # In one store: each takes two barriers.
        tl.store(tokens + row * Q * 2 + (q[:, None] * 2 + tl.arange(0, 2)[None, :]), tl.join(own, crossing))
        if skipped is not None:
            # A part for each of four warps.
            tl.store(skipped + row * 4 + tl.arange(0, 4), tl.sum(tl.reshape(past, [4, Q // 4]), 1))
    totals = split * totals_split + (batch * L * (H // PER_GROUP) + group) * N + first * out_time
    dBC = dBC.to(DOT)
    dBs = load_tile(dB + totals, rows * out_time, n, exists, N, EVEN_N, tl.float32)
    # Loaded again, so as not to take memory of the heads' tiles.
    Cs = load_tile(C, rows * C_time, n, exists, N, EVEN_N, DOT)
    store_tile(dB + totals, rows * out_time, n, tl.dot(dBC, Cs, dBs, input_precision=PRECISION), exists, N, EVEN_N)
    dCs = load_tile(dC + totals, rows * out_time, n, exists, N, EVEN_N, tl.float32)
    dCs = tl.dot(tl.trans(dBC), Bs, dCs, input_precision=PRECISION)
    store_tile(dC + totals, rows * out_time, n, dCs, exists, N, EVEN_N)


def gradients(
    x: Tensor,
    dy: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    table: Tensor | None,
    steps: Steps,
    states: Tensor,
    adjoints: Tensor,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    tiles: Tiles,
    reverse: bool,
    heads_at_once: int,
    shift: bool,
    added: Tensor | None,
) -> Flows:
    """Write dx, and dB and dC for each part of a group's heads, and dD, (b, chunks, h, p), where it is given.

    What is ``added`` to dx has its layout, and may be dx itself.
    ``shift``: y was that of the token before, as in the kernel of the walk.
    """
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    chunks, splits = states.shape[1], dB.shape[0]
    grid = (batch * chunks, groups * splits, 1)
    tokens, into = steps.delta.new_empty(2, batch, heads, chunks, tiles.Q, 2)
    through = into.new_empty(batch, heads, chunks, tiles.BP)
    skipped = None if D is None or dD is not None else into.new_empty(batch, heads, chunks, 4)
    x, dy, B, C, dx = (from_first(t, 1, reverse) for t in (x, dy, B, C, dx))
    dB, dC = (from_first(t, 2, reverse) for t in (dB, dC))
    added = None if added is None else from_first(added, 1, reverse)
    of_x, of_dy, of_B, of_C, of_dx = (token_strides(t, reverse) for t in (x, dy, B, C, dx))
    out_time = -dB.stride(2) if reverse else dB.stride(2)
    far = tiles.Q * max(abs(s[1]) for s in (of_x, of_dy, of_B, of_C, of_dx)) >= 1 << 31
    common = (l, heads, p, chunks, steps.sums.stride(0), *of_x[::2], *of_dy[::2])
    of_state, of_chunk = gradient_configs(tiles)
    constants = (
        heads // groups, heads_at_once, shift, table is None and l % tiles.Q == 0, far, tiles.precise, tiles.DOT,
        tiles.Q, n, tiles.BP, tiles.BN, -(-p // tiles.BP), p % tiles.BP == 0, n == tiles.BN,
    )  # fmt: skip
    ssd_state_gradients.launch(
        grid,
        (x, dy, C, table, steps.weights, steps.sums, states, adjoints, dB, dC, into, through),
        (*common, *of_C[::2], dB.stride(0)),
        (of_x[1], of_dy[1], of_C[1], out_time, *constants, of_state.stages),
        of_state.warps,
    )
    skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    # With a D for each channel, or where the products do not have the token's own dy.
    elementwise = D is not None and (shift or D.dim() == 2)
    ssd_chunk_gradients.launch(
        grid,
        (x, dy, B, C, D, table, steps.delta, steps.sums, adjoints, added, dB, dC, dx, dD, tokens, skipped),
        (*common, *of_B[::2], *of_C[::2], *skip, dB.stride(0)),
        (of_x[1], of_dy[1], of_B[1], of_C[1], out_time, of_dx[1], elementwise, *constants, of_chunk.stages),
        of_chunk.warps,
    )
    return Flows(tokens, into, through, skipped)
