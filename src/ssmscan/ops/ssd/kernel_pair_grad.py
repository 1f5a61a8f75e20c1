"""What pairs of tokens of a chunk give to the gradients of ssd, all chunks in parallel; and the launcher.

With w_ij the decay from token j to i:

    dx_j = Δ_j Σ_i w_ij (C_i·B_j) dy_i + D dy_j,    dC_i = Σ_j w_ij Δ_j (dy_i·x_j) B_j,
    dB_j = Δ_j Σ_i w_ij (dy_i·x_j) C_i,    and what flows over the decay of t from tokens before it to those from it on.

They are added to what the states give. A program takes a chunk and some heads of one group, whose dB and dC it sums in
registers.
"""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp2
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import pair_gradient_config
from ssmscan.ops.ssd.kernel_grad import Chunks
from ssmscan.ops.ssd.step_sizes import PairFlows
from ssmscan.ops.ssd.tiles import decays, followed, heads_of, load_tile, logarithms, store_tile, tokens_of


@kernel(do_not_specialize=["L", "chunks"])
def ssd_pair_gradients(
    # read
    x, dy, B, C, D, added, table, deltas, sums,
    # written; to dB and dC it is added
    dx, dB, dC, dD, tokens, skipped,
    # sizes
    L, H, P, chunks,
    # strides: between both sums, between scans, and of tensors; those along the time are constants
    part, steps_scan, sums_scan,
    x_batch, x_head, dy_batch, dy_head, B_batch, B_group, C_batch, C_group, totals_split, D_head, D_p,
    x_time: tl.constexpr, dy_time: tl.constexpr, B_time: tl.constexpr, C_time: tl.constexpr, out_time: tl.constexpr,
    dx_time: tl.constexpr,
    # what is taken
    SCANS: tl.constexpr, PER_GROUP: tl.constexpr, HEADS: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr,
    FAR: tl.constexpr,
    # tiles
    PRECISE: tl.constexpr, DOT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, ELEMENTWISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a pair of tokens the one that gives, j, is the row.

    Of two SCANS the second goes the other way, and its chunks and their tokens are counted from the other end. What is
    ``added`` to dx may be its own memory. SHIFT: the scan's own dy is that of the next token. ELEMENTWISE: D
    is applied to each element, otherwise in the product of each token with itself.
    """
    PRECISION: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    group, split, begin, end = heads_of(PER_GROUP, HEADS)
    batch, chunk, first, count, q, rows, exists = tokens_of(table, chunks, L, Q, WHOLE, FAR)
    n = tl.arange(0, BN)
    B += batch * B_batch + first * B_time + group * B_group
    C += batch * C_batch + first * C_time + group * C_group
    Bs = load_tile(B, rows * B_time, n, exists, N, EVEN_N, DOT)
    Cs = load_tile(C, rows * C_time, n, exists, N, EVEN_N, DOT)
    BC = tl.dot(Bs, tl.trans(Cs), input_precision=PRECISION)
    x += batch * x_batch + first * x_time
    dy += batch * dy_batch + first * dy_time
    shown = followed(table, chunk, chunks, first, count, q, L) if SHIFT else exists
    dx += batch * L * H * P + first * dx_time
    added += batch * L * H * P + first * dx_time
    dBC = tl.zeros((Q, Q), tl.float32)
    diagonal = q[:, None] == q[None, :]
    onward = q[:, None] <= q[None, :]
    ahead = q[:, None] < q[None, :]
    # As the other scan counts tokens.
    r = Q - 1 - q
    for head in tl.range(begin, end, num_stages=STAGES):
        wide = tl.cast(head, tl.int64)
        row = (batch * H + wide) * chunks + chunk
        delta = tl.load(deltas + row * Q + q)[:, None]
        if SCANS == 1:
            pairs, _, _, _ = decays(sums + row * Q, part, q, 0, PRECISE, Q, False)
        else:
            other = (batch * H + wide) * chunks + (chunks - 1 - chunk)
            to_later, _, _, _ = logarithms(sums + row * Q, part, q, 0, PRECISE, Q, False)
            to_earlier, _, _, _ = logarithms(sums + (sums_scan + other * Q), part, r, 0, PRECISE, Q, False)
            pairs = exp2(tl.where(onward, to_later, to_earlier))
            other_delta = tl.load(deltas + (steps_scan + other * Q) + r)[:, None]
            delta = tl.where(onward, delta, 0.0) + tl.where(ahead, 0.0, other_delta)
        scores = BC * pairs * delta
        # layout: one number for a head costs nothing in the product of each token with itself.
        if D is not None and not ELEMENTWISE:
            scores += tl.where(diagonal, tl.load(D + head * D_head).to(tl.float32), 0.0)
        scores = scores.to(DOT)
        products = tl.zeros((Q, Q), tl.float32)
        past = tl.zeros((Q,), tl.float32)
        for block in tl.range(BLOCKS, num_stages=1):
            p = block * BP + tl.arange(0, BP)
            xs = load_tile(x + wide * x_head, rows * x_time, p, exists, P, EVEN_P, DOT)
            dys = load_tile(dy + SHIFT * dy_time + wide * dy_head, rows * dy_time, p, shown, P, EVEN_P, DOT)
            dxs = load_tile(added + wide * P, rows * dx_time, p, exists, P, EVEN_P, tl.float32)
            dxs = tl.dot(scores, dys, dxs, input_precision=PRECISION)
            if ELEMENTWISE:
                skip = tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32)
                direct = dys
                if SHIFT:
                    direct = load_tile(dy + wide * dy_head, rows * dy_time, p, exists, P, EVEN_P, DOT)
                dxs += direct.to(tl.float32) * skip[None, :]
                weighted = direct.to(tl.float32) * xs.to(tl.float32)
                if dD is not None:
                    of_chunk = (batch * chunks + chunk) * H + wide
                    tl.store(dD + of_chunk * P + p, tl.sum(weighted, 0), mask=p < P)
                else:
                    past += tl.sum(weighted, 1)
            store_tile(dx + wide * P, rows * dx_time, p, dxs, exists, P, EVEN_P)
            products = tl.dot(xs, tl.trans(dys), products, input_precision=PRECISION)
        if D is not None and not ELEMENTWISE:
            past = tl.sum(tl.where(diagonal, products, 0.0), 1)
        products *= pairs
        dBC += products * delta
        products *= BC
        if SCANS == 1:
            own = tl.sum(products, 1)
        else:
            own = tl.sum(tl.where(onward, products, 0.0), 1)
            other_own = tl.sum(tl.where(ahead, 0.0, products), 1)
        # Over decay t flows what comes from tokens before t to those from t on. Sums of just these: where the decay is
        # 0 they are 0 too. Here t is the row. Not rounded to DOT: the gradient of A is a sum of these, in which they
        # may cancel.
        products = tl.trans(products * delta)
        crossing = tl.dot(onward.to(tl.float32), products, input_precision=PRECISION)
        crossing = tl.sum(tl.where(onward, 0.0, crossing), 1)
        # layout: in one store, as each takes two barriers.
        two = tl.arange(0, 2)[None, :]
        tl.store(tokens + row * Q * 2 + (q[:, None] * 2 + two), tl.join(own, crossing))
        if SCANS == 2:
            crossing = tl.dot(tl.trans(onward.to(tl.float32)), products, input_precision=PRECISION)
            crossing = tl.sum(tl.where(ahead, crossing, 0.0), 1)
            tl.store(tokens + (steps_scan + other * Q) * 2 + (r[:, None] * 2 + two), tl.join(other_own, crossing))
        if skipped is not None:
            # layout: a part for each of four warps, which then need no sum across them.
            tl.store(skipped + row * 4 + tl.arange(0, 4), tl.sum(tl.reshape(past, [4, Q // 4]), 1))
    totals = split * totals_split + (batch * L * (H // PER_GROUP) + group) * N + first * out_time
    dBC = dBC.to(DOT)
    dBs = load_tile(dB + totals, rows * out_time, n, exists, N, EVEN_N, tl.float32)
    # layout: loaded again, so as not to take shared memory of the heads' tiles.
    Cs = load_tile(C, rows * C_time, n, exists, N, EVEN_N, DOT)
    store_tile(dB + totals, rows * out_time, n, tl.dot(dBC, Cs, dBs, input_precision=PRECISION), exists, N, EVEN_N)
    dCs = load_tile(dC + totals, rows * out_time, n, exists, N, EVEN_N, tl.float32)
    Bs = load_tile(B, rows * B_time, n, exists, N, EVEN_N, DOT)
    dCs = tl.dot(tl.trans(dBC), Bs, dCs, input_precision=PRECISION)
    store_tile(dC + totals, rows * out_time, n, dCs, exists, N, EVEN_N)


def pair_gradients(
    chunks: Chunks, D: Tensor | None, added: Tensor, dx: Tensor, dD: Tensor | None, shift: bool
) -> PairFlows:
    """Write ``dx``, to which ``added`` is, and ``dD``, (b, chunks, h, p), where it is given; add to dB and dC.

    ``added`` has the layout of dx, and may be dx itself.
    """
    delta, _, sums = chunks.steps
    tokens = delta.new_empty(*delta.shape, 2)
    skipped = None if D is None or dD is not None else delta.new_empty(*delta.shape[1:4], 4)
    dx, added = (from_first(t, 1, chunks.reverse) for t in (dx, added))
    skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    # With a D for each channel, or where the products do not have the token's own dy.
    elementwise = D is not None and (shift or D.dim() == 2)
    config = pair_gradient_config(chunks.tiles, delta.shape[0])
    ssd_pair_gradients.launch(
        chunks.grid,
        (
            chunks.x, chunks.dy, chunks.B, chunks.C, D, added, chunks.table, delta, sums, dx, *chunks.totals, dD,
            tokens, skipped,
        ),
        (*chunks.sizes, *chunks.strides, *skip),
        (*chunks.constants, elementwise, config.stages),
        config.warps,
    )  # fmt: skip
    return PairFlows(tokens, skipped)
