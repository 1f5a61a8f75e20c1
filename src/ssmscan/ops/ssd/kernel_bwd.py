"""The backward of ssd on Triton: two walks, which keep the states before chunks, then the gradients of each chunk."""

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.configs import choose, gradient_tiles, split_heads
from ssmscan.ops.ssd.kernel_fwd import float32, table
from ssmscan.ops.ssd.kernel_grad import gradients
from ssmscan.ops.ssd.kernel_steps import step_gradients, steps
from ssmscan.ops.ssd.kernel_walk import walk

# The states between chunks of as many batch rows are kept at once.
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
    ddt, dA, dB, dC, dD, dbias = scan_gradients(
        x, dt, A, B, C, D, z, dt_bias, h0, sequence, dy, dh, (softplus, low, high), reverse, dx, dz,
        dh0 if initial else None,
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dh0


def scan_gradients(
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
    options: tuple[bool, float, float],
    reverse: bool,
    dx: Tensor,
    dz: Tensor | None = None,
    dh0: Tensor | None = None,
    *,
    shift: bool = False,
    added: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of dt, A, B, C, D and dt_bias; ``dx``, to which ``added`` is, ``dz`` and ``dh0`` are written."""
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    ddt = dt.new_empty(dt.shape)
    tiles = choose(x, n, backward=True)
    wide = gradient_tiles(tiles, p)
    chunked = None if h0 is None else table(sequence, h0, tiles, reverse)
    chunks = -(-l // tiles.Q) if chunked is None else chunked.shape[1]
    of_heads, splits = split_heads(batch * chunks * groups, heads // groups)
    # Without tokens or channels no kernel runs.
    new = x.new_empty if x.numel() > 0 else x.new_zeros
    # Each chunk gives a part of the gradients of A, dt_bias and D, each split of the heads one of those of B and C.
    of_head = new((3, batch, chunks, heads), dtype=torch.float32)
    dAs, dbiases, dDs = of_head
    by_head, by_channel = (D is not None and D.dim() == axes for axes in (1, 2))
    of_channel = new((batch, chunks, heads, p) if by_channel else (0,), dtype=torch.float32)
    dBs, dCs = new((2, splits, batch, l, groups, n), dtype=torch.float32)
    if x.numel() > 0:
        xs, Bs, Cs, dys = (channels_last(v) for v in (x, B, C, dy))
        rate, bias = float32(A), float32(dt_bias)
        at_once = max(min(STATES_BYTES // (2 * chunks * heads * p * n * tiles.dtype.itemsize), batch), 1)
        states, adjoints = x.new_empty(2, at_once, chunks, heads, p, n, dtype=tiles.dtype)
        for begin in range(0, batch, at_once):
            part = slice(begin, begin + at_once)
            # Packed sequences have one batch row, and many states.
            own = part if sequence is None else slice(None)
            x_, dt_, B_, C_, dy_ = (v[part] for v in (xs, dt, Bs, Cs, dys))
            sizes = steps(dt_, rate, bias, chunked, tiles, options, reverse)
            h, last, first = (None if v is None else v[own] for v in (h0, dh, dh0))
            y = None if z is None else x.new_empty(x_.shape, dtype=tiles.dtype)
            walk(x_, B_, sizes, h, chunked, tiles, reverse, c=C_, D=D, y=y, states=states)
            if z is not None and y is not None and dz is not None:
                dy_ = gate(dy_, y, z[part], dz[part])
            walk(
                dy_, C_, sizes, last, chunked, tiles, reverse, adjoint=True, shift=shift, states=adjoints, final=first
            )  # fmt: skip
            flows = gradients(
                x_, dy_, B_, C_, D, chunked, sizes, states, adjoints, dx[part], dBs[:, part], dCs[:, part],
                of_channel[part] if by_channel else None, wide, reverse, of_heads, shift,
                None if added is None else added[part],
            )  # fmt: skip
            step_gradients(
                dt_, rate, bias, chunked, sizes, flows, ddt[part], dAs[part], dbiases[part],
                dDs[part] if by_head else None, wide, options, reverse,
            )  # fmt: skip
            # Before the next rows have theirs.
            del sizes, flows, y
        # Not while the sums are made.
        del states, adjoints
    # Sums in a fixed order, so always the same.
    dA, dbias, dD = of_head.sum((1, 2))
    dB, dC = (v[0] if splits == 1 else v.sum(0) for v in (dBs, dCs))
    if by_channel:
        dD = of_channel.sum((0, 1))
    return ddt, *(_like(v, t) for v, t in ((dA, A), (dB, B), (dC, C), (dD, D), (dbias, dt_bias)))


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
