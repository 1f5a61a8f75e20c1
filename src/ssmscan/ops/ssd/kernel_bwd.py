"""The backward of ssd on Triton: two walks, which keep the states before chunks, then the gradients of each chunk."""

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.configs import gradient_tiles, split_heads, tiles_for
from ssmscan.ops.ssd.kernel_fwd import float32, table
from ssmscan.ops.ssd.kernel_grad import chunks_of
from ssmscan.ops.ssd.kernel_pair_grad import pair_gradients
from ssmscan.ops.ssd.kernel_state_grad import state_gradients
from ssmscan.ops.ssd.kernel_walk import walk
from ssmscan.ops.ssd.step_sizes import step_gradients, steps

# The states between chunks of as many batch rows are kept at once, for each scan.
STATES_BYTES = 1 << 29
GATE_BLOCK = 1024


@kernel(do_not_specialize=["size"])
def ssd_gate(dy, y, z, dz, gated, size, BLOCK: tl.constexpr):
    """The gradients of y·silu(z) by z and by y."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    dys = tl.load(dy + i, mask=mask, other=0.0).to(tl.float32)
    ys = tl.load(y + i, mask=mask, other=0.0).to(tl.float32)
    zs = tl.load(z + i, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-zs))
    tl.store(dz + i, (dys * ys * sigmoid * (1.0 + zs * (1.0 - sigmoid))).to(dz.dtype.element_ty), mask=mask)
    tl.store(gated + i, (dys * zs * sigmoid).to(gated.dtype.element_ty), mask=mask)


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
    dy: Tensor,
    dh: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
    initial: bool,
) -> tuple[Tensor, ...]:
    """The gradients of all arguments, empty for those not given; of h0 where ``initial``."""
    dx = x.new_empty(x.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dh0 = x.new_empty(h0.shape if h0 is not None and initial else (0,), dtype=torch.float32)
    if initial and (sequence is not None or x.shape[1] == 0):
        # The state of an empty sequence passes through; the kernel writes the others.
        dh0.copy_(dh) if dh is not None else dh0.zero_()
    (ddt,), (dA, dB, dC, dD, dbias) = scan_gradients(
        x, [(dt, reverse)], A, B, C, D, z, dt_bias, h0, sequence, dy, dh, (softplus, low, high), dx, dz,
        dh0 if initial else None,
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dh0


def scan_gradients(
    x: Tensor,
    scans: list[tuple[Tensor, bool]],
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    options: tuple[bool, float, float],
    dx: Tensor,
    dz: Tensor | None = None,
    dh0: Tensor | None = None,
    *,
    shift: bool = False,
    added: Tensor | None = None,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The gradients of each dt, and of A, B, C, D and dt_bias; ``dx``, plus ``added``, ``dz`` and ``dh0`` are written.

    Of the ``scans`` their dt is given and whether they go from the end: one, or, where they are :func:`joint`, both.
    """
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    ddts = [dt.new_empty(dt.shape) for dt, _ in scans]
    tiles = tiles_for(x, n, backward=True)
    wide = gradient_tiles(tiles, p)
    tables = [None if h0 is None else table(sequence, h0, tiles, reverse) for _, reverse in scans]
    chunks = -(-l // tiles.Q) if tables[0] is None else tables[0].shape[1]
    of_heads, splits = split_heads(batch * chunks * groups, heads // groups)
    # Without tokens or channels no kernel runs.
    new = x.new_empty if x.numel() > 0 else x.new_zeros
    # Each chunk gives a part of the gradients of A, dt_bias and D, each split of the heads one of those of B and C.
    of_head = new((3, len(scans), batch, chunks, heads), dtype=torch.float32)
    by_head, by_channel = (D is not None and D.dim() == axes for axes in (1, 2))
    of_channel = new((batch, chunks, heads, p) if by_channel else (0,), dtype=torch.float32)
    dBs, dCs = new((2, splits, batch, l, groups, n), dtype=torch.float32)
    if x.numel() > 0:
        xs, Bs, Cs, dys = (channels_last(v) for v in (x, B, C, dy))
        rate, bias = float32(A), float32(dt_bias)
        at_once = max(min(STATES_BYTES // (2 * chunks * heads * p * n * tiles.dtype.itemsize), batch), 1)
        states, adjoints = x.new_empty(2, len(scans), at_once, chunks, heads, p, n, dtype=tiles.dtype)
        for begin in range(0, batch, at_once):
            part = slice(begin, begin + at_once)
            # Packed sequences have one batch row, and many states.
            own = part if sequence is None else slice(None)
            x_, B_, C_, dy_ = (v[part] for v in (xs, Bs, Cs, dys))
            dts = [(dt[part], reverse) for dt, reverse in scans]
            h, last, first = (None if v is None else v[own] for v in (h0, dh, dh0))
            sizes = steps(dts, rate, bias, tables, tiles, options)
            y = None if z is None else x.new_empty(x_.shape, dtype=tiles.dtype)
            for scan, (_, reverse) in enumerate(scans):
                given = (tables[scan], tiles, reverse)
                walk(x_, B_, sizes, h, *given, scan=scan, c=C_, D=D, y=y, states=states[scan])
                if z is not None and y is not None and dz is not None:
                    dy_ = gate(dy_, y, z[part], dz[part])
                walk(
                    dy_, C_, sizes, last, *given, scan=scan, adjoint=True, shift=shift, states=adjoints[scan],
                    final=first,
                )  # fmt: skip
            dx_ = dx[part]
            # The tensors are read in the direction of the first scan.
            shared = chunks_of(
                x_, dy_, B_, C_, dx_, dBs[:, part], dCs[:, part], tables[0], sizes, wide, scans[0][1], of_heads, shift
            )  # fmt: skip
            partial = dx_ if dx.dtype is tiles.dtype else x.new_empty(x_.shape, dtype=tiles.dtype)
            of_states = state_gradients(shared, None if added is None else added[part], states, adjoints, partial)
            of_pairs = pair_gradients(shared, D, partial, dx_, of_channel[part] if by_channel else None, shift)
            for scan, (dt, reverse) in enumerate(dts):
                dA, dbias, dD = of_head[:, scan, part]
                step_gradients(
                    scan, dt, rate, bias, tables[scan], sizes, of_pairs, of_states, ddts[scan][part], dA, dbias,
                    dD if by_head and scan == 0 else None, wide, options, reverse,
                )  # fmt: skip
            # Before the next rows have theirs.
            del sizes, shared, of_states, of_pairs, y, partial
        # Not while the sums are made.
        del states, adjoints
    # Sums in a fixed order, so always the same.
    totals = of_head.sum((2, 3))
    dA, dbias = totals[:2, 0] if len(scans) == 1 else totals[:2].sum(1)
    # The first scan's, which alone has D.
    dD = of_channel.sum((0, 1)) if by_channel else totals[2, 0]
    dB, dC = (v[0] if splits == 1 else v.sum(0) for v in (dBs, dCs))
    return ddts, tuple(_like(v, t) for v, t in ((dA, A), (dB, B), (dC, C), (dD, D), (dbias, dt_bias)))


def joint(x: Tensor, B: Tensor, sequence: Tensor | None, shift: bool) -> bool:
    """Whether both directions can share all but the walks: the same chunks, and heads of one block of channels."""
    tiles = tiles_for(x, B.shape[3], backward=True)
    blocks = -(-x.shape[3] // gradient_tiles(tiles, x.shape[3]).BP)
    return sequence is None and not shift and x.shape[1] % tiles.Q == 0 and blocks == 1


def _like(total: Tensor, like: Tensor | None) -> Tensor:
    return total.new_empty(0) if like is None else like.new_empty(like.shape).copy_(total)


def gate(dy: Tensor, y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """Write ``dz``, and return the gradient of y before the gate."""
    gated = torch.empty_like(y)
    size = y.numel()
    ssd_gate.launch(
        (-(-size // GATE_BLOCK), 1, 1), (dy.contiguous(), y, z.contiguous(), dz, gated), (size,), (GATE_BLOCK,), 4
    )
    return gated
