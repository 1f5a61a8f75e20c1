"""The backward of ssd on Triton: two walks, which keep the states before chunks, then the gradients of each chunk."""

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.configs import choose, split_heads
from ssmscan.ops.ssd.kernel_fwd import float32, per_channel, table
from ssmscan.ops.ssd.kernel_grad import gradients
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
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dh0 = x.new_empty(h0.shape if h0 is not None and initial else (0,), dtype=torch.float32)
    if initial and (sequence is not None or l == 0):
        # The state of an empty sequence passes through; the kernel writes the others.
        dh0.copy_(dh) if dh is not None else dh0.zero_()
    tiles = choose(x, n, backward=True)
    chunked = None if h0 is None else table(sequence, h0, tiles, reverse)
    # Without tokens packed sequences still have a chunk each, of which no kernel would write a part.
    chunks = -(-l // tiles.Q) if chunked is None or l == 0 else chunked.shape[1]
    of_heads, splits = split_heads(batch * chunks * groups, heads // groups)
    # Each chunk gives a part of the gradients of A, D and dt_bias, each split of the heads one of those of B and C.
    dAs, dbiases = x.new_empty(2, batch, chunks, heads, dtype=torch.float32)
    dDs = x.new_empty(batch, chunks, heads, 0 if D is None else p, dtype=torch.float32)
    dBs, dCs = x.new_empty(2, splits, batch, l, groups, n, dtype=torch.float32)
    if x.numel() > 0:
        step = (softplus, low, high)
        xs, Bs, Cs, dys = (channels_last(v) for v in (x, B, C, dy))
        rate, bias, skip = float32(A), float32(dt_bias), per_channel(D, p)
        at_once = max(min(STATES_BYTES // (2 * chunks * heads * p * n * tiles.dtype.itemsize), batch), 1)
        states, adjoints = x.new_empty(2, at_once, chunks, heads, p, n, dtype=tiles.dtype)
        for begin in range(0, batch, at_once):
            part = slice(begin, begin + at_once)
            # Packed sequences have one batch row, and many states.
            own = part if sequence is None else slice(None)
            x_, dt_, B_, C_, dy_ = (v[part] for v in (xs, dt, Bs, Cs, dys))
            h, last = (None if v is None else v[own] for v in (h0, dh))
            y = None if z is None else x.new_empty(x_.shape, dtype=tiles.dtype)
            walk(x_, B_, dt_, rate, bias, h, chunked, tiles, step, reverse, c=C_, D=skip, y=y, states=states)
            if z is not None and y is not None:
                dy_ = _gate(dy_, y, z[part], dz[part])
            walk(
                dy_, C_, dt_, rate, bias, last, chunked, tiles, step, reverse, adjoint=True, states=adjoints,
                final=dh0[own] if initial else None,
            )  # fmt: skip
            outputs = (
                dx[part], ddt[part], dAs[part], None if D is None else dDs[part],
                None if bias is None else dbiases[part],
            )  # fmt: skip
            gradients(
                x_, dy_, dt_, rate, bias, B_, C_, skip, chunked, states, adjoints, (dBs[:, part], dCs[:, part]),
                outputs, tiles, step, reverse, of_heads,
            )  # fmt: skip
    dD = _sum(dDs, (0, 1) if D is not None and D.dim() == 2 else (0, 1, 3), D)
    dA, dbias = _sum(dAs, (0, 1), A), _sum(dbiases, (0, 1), dt_bias)
    return dx, ddt, dA, _sum(dBs, (0,), B), _sum(dCs, (0,), C), dD, dz, dbias, dh0


def _sum(parts: Tensor, axes: tuple[int, ...], like: Tensor | None) -> Tensor:
    """In a fixed order, so always the same."""
    return parts.new_empty(0) if like is None else like.new_empty(like.shape).copy_(parts.sum(axes))


def _gate(dy: Tensor, y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """Write ``dz``, and return the gradient of y before the gate."""
    gated = torch.empty_like(y)
    size = y.numel()
    ssd_gate.launch(
        (-(-size // GATE_BLOCK), 1, 1), (dy.contiguous(), y, z.contiguous(), dz, gated), (size,), (GATE_BLOCK,), 4
    )
    return gated
