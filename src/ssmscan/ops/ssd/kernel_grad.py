"""The gradients of ssd, all chunks in parallel, from the states that enter them; and their launcher.

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
from ssmscan.ops.ssd.configs import GRADIENTS, Tiles
from ssmscan.ops.ssd.tiles import (
    LARGEST,
    LOG2E,
    biased,
    bounded,
    decays,
    load_tile,
    place,
    slopes,
    step_sizes,
    store_tile,
)


@triton.jit
def _heads(PER_GROUP: tl.constexpr, HEADS: tl.constexpr):
    """This program's group, its part of the group's heads, and the first and end of those."""
    SPLITS: tl.constexpr = (PER_GROUP + HEADS - 1) // HEADS
    group = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    first = group * PER_GROUP + split * HEADS
    return group.to(tl.int64), split.to(tl.int64), first, min(first + HEADS, (group + 1) * PER_GROUP)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_state_gradients(
    x, dy, dt, A, bias, C, table, states, adjoints, dB, dC, into, through,
    L, H, P, N, chunks, x_batch, x_time, x_head, dy_batch, dy_time, dy_head, dt_batch, dt_time, dt_head,
    C_batch, C_time, C_group, sums_split,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    REVERSE: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the states give to dB and dC, what flows from h into each token, and from h to g."""
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = _heads(PER_GROUP, HEADS)
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    first, count = place(table, chunk, chunks, L, Q)
    exists = q < count
    t = tl.cast(L - 1 if REVERSE else 0, tl.int64) + (first + q) * (-1 if REVERSE else 1)
    Cs = load_tile(C + batch * C_batch + group * C_group, t * C_time, n, exists, N, EVEN_N, DOT)
    x += batch * x_batch
    dy += batch * dy_batch
    dt += batch * dt_batch
    # Outputs (b, l, ...), and those for each chunk (b, chunks, ...).
    rows = batch * L + t
    row = batch * chunks + chunk
    dBs = tl.zeros((Q, BN), tl.float32)
    dCs = tl.zeros((Q, BN), tl.float32)
    diagonal = tl.arange(0, BP)[:, None] == tl.arange(0, BP)[None, :]
    for head in tl.range(begin, end, num_stages=STAGES):
        wide = tl.cast(head, tl.int64)
        raw = biased(dt + t * dt_time + wide * dt_head, bias, head, exists)
        delta = step_sizes(raw, exists, SOFTPLUS, LOW, HIGH)
        log_a = bounded(delta * tl.load(A + head).to(tl.float32) * LOG2E, -LARGEST, LARGEST)
        _, entered, left, _ = decays(log_a, q, 1, PRECISE)
        left *= delta
        arriving = tl.zeros((Q,), tl.float32)
        flow = 0.0
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            inside = p < P
            state_rows = ((row * H + head) * P + p) * N
            xs = load_tile(x, t * x_time + wide * x_head, p, exists, P, EVEN_P, DOT).to(tl.float32)
            dys = load_tile(dy, t * dy_time + wide * dy_head, p, exists, P, EVEN_P, DOT).to(tl.float32)
            hs = load_tile(states, state_rows, n, inside, N, EVEN_N, DOT)
            gs = load_tile(adjoints, state_rows, n, inside, N, EVEN_N, DOT)
            dCs = tl.dot((dys * entered[:, None]).to(DOT), hs, dCs, input_precision=PRECISION)
            dBs = tl.dot((xs * left[:, None]).to(DOT), gs, dBs, input_precision=PRECISION)
            arriving += tl.sum(tl.dot(Cs, tl.trans(hs), input_precision=PRECISION) * dys, 1)
            # The sum of h·g, as a trace: elementwise it takes more registers than there are.
            pairing = tl.dot(hs, tl.trans(gs), input_precision=PRECISION)
            flow += tl.sum(tl.sum(tl.where(diagonal, pairing, 0.0), 1), 0)
        tl.store(into + rows * H + head, arriving * entered, mask=exists)
        tl.store(through + row * H + head, flow)
    sums = split * sums_split + (rows * (H // PER_GROUP) + group) * N
    store_tile(dB, sums, n, dBs, exists, N, EVEN_N)
    store_tile(dC, sums, n, dCs, exists, N, EVEN_N)


@kernel(do_not_specialize=["L", "chunks"])
def ssd_chunk_gradients(
    x, dy, dt, A, bias, B, C, D, table, adjoints, into, through, dB, dC, dx, ddt, dA, dD, dbias,
    L, H, P, N, chunks, x_batch, x_time, x_head, dy_batch, dy_time, dy_head, dt_batch, dt_time, dt_head,
    B_batch, B_time, B_group, C_batch, C_time, C_group, D_head, D_p, sums_split,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    REVERSE: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All other gradients, and the sums of dB and dC. Of a pair of tokens the earlier one, j, is the row."""
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = _heads(PER_GROUP, HEADS)
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    first, count = place(table, chunk, chunks, L, Q)
    exists = q < count
    t = tl.cast(L - 1 if REVERSE else 0, tl.int64) + (first + q) * (-1 if REVERSE else 1)
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    Bs = load_tile(B, t * B_time, n, exists, N, EVEN_N, DOT)
    Cs = load_tile(C, t * C_time, n, exists, N, EVEN_N, DOT)
    BC = tl.dot(Bs, tl.trans(Cs), input_precision=PRECISION)
    x += batch * x_batch
    dy += batch * dy_batch
    dt += batch * dt_batch
    rows = batch * L + t
    row = batch * chunks + chunk
    dBC = tl.zeros((Q, Q), tl.float32)
    for head in tl.range(begin, end, num_stages=STAGES):
        wide = tl.cast(head, tl.int64)
        rate = tl.load(A + head).to(tl.float32)
        raw = biased(dt + t * dt_time + wide * dt_head, bias, head, exists)
        delta = step_sizes(raw, exists, SOFTPLUS, LOW, HIGH)
        pairs, _, left, total = decays(bounded(delta * rate * LOG2E, -LARGEST, LARGEST), q, 0, PRECISE)
        scores = (BC * pairs * delta[:, None]).to(DOT)
        products = tl.zeros((Q, Q), tl.float32)
        onward = tl.zeros((Q,), tl.float32)
        for block in tl.static_range(BLOCKS):
            p = block * BP + tl.arange(0, BP)
            inside = p < P
            xs = load_tile(x, t * x_time + wide * x_head, p, exists, P, EVEN_P, DOT)
            dys = load_tile(dy, t * dy_time + wide * dy_head, p, exists, P, EVEN_P, DOT)
            gs = load_tile(adjoints, ((row * H + head) * P + p) * N, n, inside, N, EVEN_N, DOT)
            xf = xs.to(tl.float32)
            dxs = tl.dot(Bs, tl.trans(gs), input_precision=PRECISION) * left[:, None]
            onward += tl.sum(dxs * xf, 1)
            dxs = tl.dot(scores, dys, dxs * delta[:, None], input_precision=PRECISION)
            if D is not None:
                dyf = dys.to(tl.float32)
                dxs += dyf * tl.load(D + head * D_head + p * D_p, mask=inside, other=0.0).to(tl.float32)[None, :]
                tl.store(dD + (row * H + head) * P + p, tl.sum(dyf * xf, 0), mask=inside)
            store_tile(dx, (rows * H + head) * P, p, dxs, exists, P, EVEN_P)
            products += tl.dot(xs, tl.trans(dys), input_precision=PRECISION)
        products *= pairs
        dBC += products * delta[:, None]
        products *= BC
        own = tl.sum(products, 1) + onward
        # Over decay t flows what comes from tokens before t to those from t on: of a pair (first axis), of the entering
        # state, to the leaving one, and from state to state. Sums of just these: where the decay is 0 they are 0 too.
        upto = (q[:, None] >= q[None, :]).to(DOT)
        flows = tl.dot((products * delta[:, None]).to(DOT), upto, input_precision=PRECISION)
        arriving = tl.load(into + rows * H + head, mask=exists, other=0.0)
        flows = tl.where(q[:, None] < q[None, :], flows + (onward * delta)[:, None], arriving[:, None])
        crossing = tl.sum(flows, 0) + tl.load(through + row * H + head) * tl.exp2(total)
        tl.store(dA + row * H + head, tl.sum(crossing * delta, 0))
        gradient = tl.where(exists, (own + rate * crossing) * slopes(raw, SOFTPLUS, LOW, HIGH), 0.0)
        tl.store(ddt + rows * H + head, gradient.to(ddt.dtype.element_ty), mask=exists)
        if dbias is not None:
            tl.store(dbias + row * H + head, tl.sum(gradient, 0))
    sums = split * sums_split + (rows * (H // PER_GROUP) + group) * N
    dBC = dBC.to(DOT)
    dBs = load_tile(dB, sums, n, exists, N, EVEN_N, tl.float32)
    store_tile(dB, sums, n, tl.dot(dBC, Cs, dBs, input_precision=PRECISION), exists, N, EVEN_N)
    dCs = load_tile(dC, sums, n, exists, N, EVEN_N, tl.float32)
    store_tile(dC, sums, n, tl.dot(tl.trans(dBC), Bs, dCs, input_precision=PRECISION), exists, N, EVEN_N)


def gradients(
    x: Tensor,
    dy: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    table: Tensor | None,
    states: Tensor,
    adjoints: Tensor,
    sums: tuple[Tensor, Tensor],
    outputs: tuple[Tensor | None, ...],
    tiles: Tiles,
    step: tuple[bool, float, float],
    reverse: bool,
    heads_at_once: int,
) -> None:
    """Write dx, ddt, dA, dD and dbias, and the ``sums`` dB and dC.

    Those of A, D and bias are for each chunk, the sums for each part of a group's heads.
    """
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    chunks, splits = states.shape[1], sums[0].shape[0]
    grid = (chunks, groups * splits, batch)
    into = dy.new_empty(batch, l, heads, dtype=sums[0].dtype)
    through = dy.new_empty(batch, chunks, heads, dtype=sums[0].dtype)
    common = [s for t in (x, dy, dt) for s in t.stride()[:3]]
    of_state, of_chunk = GRADIENTS[tiles.precise]
    constants = (
        heads // groups, heads_at_once, *step, reverse, tiles.precise, tiles.DOT, tiles.Q, tiles.BP,
        tiles.BN, -(-p // tiles.BP), p % tiles.BP == 0, n == tiles.BN,
    )  # fmt: skip
    ssd_state_gradients.launch(
        grid,
        (x, dy, dt, A, bias, C, table, states, adjoints, *sums, into, through),
        (l, heads, p, n, chunks, *common, *C.stride()[:3], sums[0].stride(0)),
        (*constants, of_state.stages),
        of_state.warps,
    )
    skip = (0, 0) if D is None else D.stride()
    ssd_chunk_gradients.launch(
        grid,
        (x, dy, dt, A, bias, B, C, D, table, adjoints, into, through, *sums, *outputs),
        (l, heads, p, n, chunks, *common, *B.stride()[:3], *C.stride()[:3], *skip, sums[0].stride(0)),
        (*constants, of_chunk.stages),
        of_chunk.warps,
    )
