"""The gradients of s4d on tensor cores: the walks that recompute the states and their gradients, and their products.

With H the states that enter the chunks, G the gradients of those that leave them, and X and dY all chunks of a channel
as rows, the gradients of a channel's matrices are

    dT = Xᵀ dY,    dV = Xᵀ G,    dW = dYᵀ H,    dP = Σ conj(H) G.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.s4d.autograd import Inputs, Options
from ssmscan.ops.s4d.configs import GRAM
from ssmscan.ops.s4d.kernel_fwd import (
    PROGRAMS,
    enter,
    entrance,
    groups,
    joined,
    parts,
    product,
    time_last,
    time_second,
    walk,
)
from ssmscan.ops.s4d.kernel_system import block, system, system_backward
from ssmscan.ops.s4d.layout import packed
from ssmscan.ops.s4d.system import CHUNK


@kernel(do_not_specialize=["rows", "length"])
def s4d_gram(
    x, dy, h, g, dT, dV, dW, dP, rows, length, n,
    PARTS: tl.constexpr, NB: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The products over ``length`` of a channel's chunks."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q = tl.arange(0, Q)
    state = tl.arange(0, NB)
    known = state < n
    t = tl.zeros((Q, Q), tl.float32)
    v = tl.zeros((Q, NB), tl.float32)
    w = v
    p = tl.zeros((R, NB), tl.float32)
    if PARTS == 2:
        v_i = v
        w_i = v
        p_i = p
    end = min((part + 1) * length, rows)
    for first in tl.range(part * length, end, R, num_stages=STAGES):
        row = first + tl.arange(0, R)
        inside = row < end
        row = channel * rows + row
        tokens = row[:, None] * Q + q[None, :]
        states = row[:, None] * (PARTS * n) + state[None, :]
        mask = inside[:, None] & known[None, :]
        u = tl.trans(tl.load(x + tokens, mask=inside[:, None], other=0.0).to(tl.float32))
        e = tl.load(dy + tokens, mask=inside[:, None], other=0.0).to(tl.float32)
        h_r = tl.load(h + states, mask=mask, other=0.0)
        g_r = tl.load(g + states, mask=mask, other=0.0)
        t += product(u, e, PRECISION)
        v += product(u, g_r, PRECISION)
        e = tl.trans(e)
        w += product(e, h_r, PRECISION)
        p += h_r * g_r
        if PARTS == 2:
            h_i = tl.load(h + states + n, mask=mask, other=0.0)
            g_i = tl.load(g + states + n, mask=mask, other=0.0)
            v_i += product(u, g_i, PRECISION)
            w_i += product(e, h_i, PRECISION)
            p += h_i * g_i
            p_i += h_r * g_i - h_i * g_r
    output = channel * tl.num_programs(1) + part
    tl.store(dT + output * Q * Q + q[:, None] * Q + q[None, :], t)
    by_time = output * Q * PARTS * n + q[:, None] * (PARTS * n) + state[None, :]
    tl.store(dV + by_time, v, mask=known[None, :])
    tl.store(dW + by_time, w, mask=known[None, :])
    tl.store(dP + output * PARTS * n + state, tl.sum(p, 0), mask=known)
    if PARTS == 2:
        tl.store(dV + by_time + n, v_i, mask=known[None, :])
        tl.store(dW + by_time + n, w_i, mask=known[None, :])
        tl.store(dP + output * PARTS * n + n + state, tl.sum(p_i, 0), mask=known)


def gram(x: Tensor, dy: Tensor, h: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of T, V, W and P; x and dy are (d, b, 64·m), h and g (d, b·m, parts·n)."""
    d, rows, m = h.shape
    PARTS = 1 + dtype.is_complex
    config = GRAM[x.dtype]
    # A fixed number of chunks each, summed in a fixed order.
    length = max(-(-rows // max(PROGRAMS // d, 1)), config.rows)
    splits = -(-rows // length)
    shapes = ((CHUNK, CHUNK), (CHUNK, m), (CHUNK, m), (m,))
    outputs = [h.new_empty(d, splits, *shape) for shape in shapes]
    s4d_gram.launch(
        (d, splits, 1),
        (x, dy, h, g, *outputs),
        (rows, length, m // PARTS),
        (PARTS, block(m // PARTS), config.rows, CHUNK, config.precision, config.stages),
        config.warps,
    )
    dT, dV, dW, dP = (output[:, 0] if splits == 1 else output.sum(1) for output in outputs)
    return dT, dV, dW, dP


def backward(
    inputs: Inputs, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, z, B, C, D, h0, sequence = inputs
    reverse = options.reverse
    dtype = C.dtype
    dz, dB, dC = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (z, B, C))
    dD = C.new_zeros(0 if D is None else D.shape[0], dtype=torch.float32)
    dh0 = C.new_zeros(0 if h0 is None else h0.shape[0], *C.shape)
    if x.numel() == 0:
        if h0 is not None and dh is not None:
            dh0.copy_(dh)
        return x.new_zeros(x.shape), dz, dB, dC, dD, dh0
    layout = None if h0 is None or sequence is None else packed(sequence, h0.shape[0], reverse)
    with torch.autocast(x.device.type, enabled=False):
        X, dY = (time_last(t, layout, reverse) for t in (x, dy))
        d, rows = X.shape[0], X[0].numel() // CHUNK
        # No walk comes to the chunks that are left over.
        new = X.new_empty if layout is None else X.new_zeros
        slices = groups(C.shape[1])
        dX = torch.empty_like(X, dtype=x.dtype if len(slices) == 1 else torch.float32)
        for i, g in enumerate(slices):
            s = system(z, B, C, None if i else D, g)
            H, G = new((2, d, rows, s.P.shape[1]), dtype=torch.float32)
            start = end = None
            if h0 is not None:
                e = entrance(h0[:, :, g], x, layout)
                start, _ = enter(s, z[:, g], e, dtype)
            if dh is not None:
                end = parts(dh[:, :, g].transpose(0, 1))
            walk(X, s, dtype, layout, start=start, states=H)
            walk(dY, s, dtype, layout, start=end, y=dX, states=G, adjoint=True, accumulate=i > 0)
            dT, dV, dW, dP = gram(X, dY, H, G, dtype)
            if h0 is not None:
                # What the initial states add to the outputs of the first chunks, of which the tokens come first here.
                zeros = (CHUNK - e.first)[:, None]
                token = torch.arange(CHUNK, device=x.device) + zeros
                head = dY.view(d, rows, CHUNK)[:, e.begin].gather(2, token.clamp(max=CHUNK - 1).expand(d, -1, -1))
                head = torch.where(token < CHUNK, head, 0.0).float()
                dW += head.mT @ e.state
            dK = system_backward(z, B, C, (dT, dV, dW, dP), (dz, dB, dC), g)
            if h0 is not None:
                # And what they leave at the end of these chunks.
                kept = (z[:, None, g] * e.first[:, None]).exp().to(dtype).conj()
                dkept = kept * joined(G[:, e.begin], dtype)
                dh0[:, :, g] = (dkept + joined(head @ s.W, dtype)).transpose(0, 1)
                dz[:, g] += (e.first[:, None] * joined(e.state, dtype).conj() * dkept).sum(1)
            if D is not None and i == 0:
                dD.copy_(dK[:, 0])
        if layout is not None:
            passed = torch.zeros_like(dh0) if dh is None else dh
            dh0 = torch.where((layout.chunks == 0)[:, None, None], passed, dh0)
        return time_second(dX, x, layout, reverse), dz, dB, dC, dD, dh0
