"""The chunk walk of s4d on tensor cores, and the forward launcher.

One program walks the chunks of 64 steps of one channel, for 16 rows of the batch at a time. Its matrices (see
``kernel_system``) stay on the multiprocessor, and the state in registers. With x a chunk's inputs, (rows, 64), and T
the Toeplitz matrix of the impulse response K,

    y = x T + h W,    h ← P h + x V.

The adjoint is a walk of the same form from the last chunk to the first, on the incoming gradient, with T transposed, V
and W exchanged and P conjugated. The first chunk is filled up with zeros in front. The initial state enters behind
these, so the walk starts from zero, is given what the state is at the end of the first chunk as ``start``, and what it
adds to the first chunk's outputs as ``head``.

The chunks of all rows lie one behind the other: m of each row of the batch, or of packed sequences, which are rows too,
as many as each needs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.s4d.autograd import Inputs, Options
from ssmscan.ops.s4d.configs import STATES, WALK
from ssmscan.ops.s4d.kernel_system import System, block, system
from ssmscan.ops.s4d.layout import Layout, packed, remainder
from ssmscan.ops.s4d.system import CHUNK

# Programs that keep a Hopper GPU busy.
PROGRAMS = 264


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a·b; TF32 operands are rounded here, for the tensor core would cut them off."""
    if PRECISION == "tf32":
        a, b = round_tf32(a), round_tf32(b)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_tf32(v):
    # Half of the last bit that is kept, 2^12, is added before the 13 bits below it are cleared.
    return ((v.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _load_state(pointer, row, inside, state, n, PARTS: tl.constexpr):
    """Real and imaginary parts of rows of n states; the latter is the former if PARTS is 1."""
    offset = row[:, None] * (PARTS * n) + state[None, :]
    mask = inside[:, None] & (state < n)[None, :]
    real = tl.load(pointer + offset, mask=mask, other=0.0)
    imaginary = real
    if PARTS == 2:
        imaginary = tl.load(pointer + offset + n, mask=mask, other=0.0)
    return real, imaginary


@triton.jit
def _store_state(pointer, row, inside, state, n, real, imaginary, PARTS: tl.constexpr):
    offset = row[:, None] * (PARTS * n) + state[None, :]
    mask = inside[:, None] & (state < n)[None, :]
    tl.store(pointer + offset, real, mask=mask)
    if PARTS == 2:
        tl.store(pointer + offset + n, imaginary, mask=mask)


@kernel(do_not_specialize=["b", "m", "chunks"])
def s4d_walk(
    # read
    x, K, V, W, P, start, head,
    # written
    y, states, final,
    # packed: the first chunk of each sequence, and how many it has
    begins, counts,
    # sizes
    b, m, chunks, n,
    # constants
    PARTS: tl.constexpr, ADJOINT: tl.constexpr, ACCUMULATE: tl.constexpr, NB: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk the chunks for some tiles of rows; ``states`` are those that enter the chunks.

    Each row has m of the channel's ``chunks``, or its own ``counts`` from ``begins`` on.
    """
    channel = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    state = tl.arange(0, NB)
    known = state < n

    # Both V and W lie as (64, parts, n).
    by_time = channel * Q * PARTS * n + q[:, None] * (PARTS * n) + state[None, :]
    by_state = channel * Q * PARTS * n + q[None, :] * (PARTS * n) + state[:, None]
    v = tl.load(V + by_time, mask=known[None, :], other=0.0)
    p = tl.load(P + channel * PARTS * n + state, mask=known, other=0.0)
    if PARTS == 2:
        v_i = tl.load(V + by_time + n, mask=known[None, :], other=0.0)
        p_i = tl.load(P + channel * PARTS * n + n + state, mask=known, other=0.0)
        if ADJOINT:
            p_i = -p_i
    if y is not None:
        w = tl.load(W + by_state, mask=known[:, None], other=0.0)
        if PARTS == 2:
            w_i = tl.load(W + by_state + n, mask=known[:, None], other=0.0)
        lag = q[:, None] - q[None, :] if ADJOINT else q[None, :] - q[:, None]
        t = tl.load(K + channel * Q + lag, mask=lag >= 0, other=0.0)

    for first in range(tl.program_id(1) * R, b, tl.num_programs(1) * R):
        row = first + tl.arange(0, R)
        inside = row < b
        begin = channel * chunks
        if begins is None:
            steps = m
            begin += row.to(tl.int64) * m
        else:
            count = tl.load(counts + row, mask=inside, other=0).to(tl.int32)
            steps = tl.max(count, 0)
            begin += tl.load(begins + row, mask=inside, other=0)
        tokens = begin[:, None] * Q + q[None, :]
        row = channel * b + row
        h = tl.zeros((R, NB), tl.float32)
        h_i = h
        if ADJOINT and start is not None:
            h, h_i = _load_state(start, row, inside, state, n, PARTS)
        for step in tl.range(0, steps, num_stages=STAGES):
            exists = inside
            if begins is None:
                chunk = m - 1 - step if ADJOINT else step
                here = tokens + chunk * Q
            else:
                exists = step < count
                chunk = count - 1 - step if ADJOINT else step + tl.zeros_like(count)
                here = tokens + (chunk * Q)[:, None]
            u = tl.load(x + here, mask=exists[:, None], other=0.0).to(tl.float32)
            if states is not None:
                _store_state(states, begin + chunk, exists, state, n, h, h_i, PARTS)
            if y is not None:
                out = product(u, t, PRECISION) + product(h, w, PRECISION)
                if PARTS == 2:
                    out += product(h_i, w_i, PRECISION)
                if head is not None:
                    entered = exists & (chunk == 0)
                    out += tl.load(head + row[:, None] * Q + q[None, :], mask=entered[:, None], other=0.0)
                if ACCUMULATE:
                    out += tl.load(y + here, mask=exists[:, None], other=0.0)
                tl.store(y + here, out.to(y.dtype.element_ty), mask=exists[:, None])
            s = product(u, v, PRECISION)
            if PARTS == 2:
                s_i = product(u, v_i, PRECISION)
                now, now_i = p[None, :] * h - p_i[None, :] * h_i + s, p[None, :] * h_i + p_i[None, :] * h + s_i
            else:
                now = p[None, :] * h + s
                now_i = now
            if start is not None and not ADJOINT:
                e, e_i = _load_state(start, row, exists & (chunk == 0), state, n, PARTS)
                now += e
                now_i += e_i
            if begins is not None:
                # A row that is at its end waits for the others of its tile.
                now, now_i = tl.where(exists[:, None], now, h), tl.where(exists[:, None], now_i, h_i)
            h = now
            h_i = now_i
        if final is not None:
            _store_state(final, row, inside, state, n, h, h_i, PARTS)


def parts(t: Tensor) -> Tensor:
    """(..., n) complex as (..., 2n), the real parts first; a real tensor as it is. Contiguous."""
    return torch.cat([t.real, t.imag], -1) if t.is_complex() else t.contiguous()


def joined(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`parts`, if ``dtype`` is complex."""
    return torch.complex(*t.chunk(2, -1)) if dtype.is_complex else t


def groups(n: int) -> list[slice]:
    """The states of each walk."""
    return [slice(i, min(i + STATES, n)) for i in range(0, max(n, 1), STATES)]


def time_last(x: Tensor, layout: Layout | None, reverse: bool) -> Tensor:
    """(b, l, d) in scan order as (d, b, 64·m), with zeros before the first token of each sequence."""
    if layout is not None:
        return layout.lay(x, in_front=True)
    b, l, d = x.shape
    padding = -l % CHUNK
    result = x.new_empty(d, b, l + padding)
    result[:, :, :padding] = 0
    result[:, :, padding:] = (x.flip(1) if reverse else x).permute(2, 0, 1)
    return result


def time_second(y: Tensor, like: Tensor, layout: Layout | None, reverse: bool) -> Tensor:
    """The inverse of :func:`time_last`, in the shape and dtype of ``like``."""
    if layout is None:
        y = y[:, :, y.shape[2] - like.shape[1] :].permute(1, 2, 0)
        y = y.flip(1) if reverse else y
    else:
        y = layout.gather(y, in_front=True)
    return like.new_empty(like.shape).copy_(y)


def walk(
    x: Tensor,
    s: System,
    dtype: torch.dtype,
    layout: Layout | None,
    *,
    start: Tensor | None,
    head: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    adjoint: bool = False,
    accumulate: bool = False,
) -> None:
    """Launch :func:`s4d_walk` on x (d, b, 64·m); ``dtype`` is the state's."""
    d, b, length = x.shape
    m = length // CHUNK
    chunks = b * m
    begins = counts = None
    if layout is not None:
        begins, counts = layout.begin, layout.chunks
        b = layout.chunks.shape[0]
    PARTS = 1 + dtype.is_complex
    n = s.P.shape[1] // PARTS
    config = WALK[x.dtype]
    rows = -(-b // config.rows)
    V, W = (s.W, s.V) if adjoint else (s.V, s.W)
    s4d_walk.launch(
        (d, min(rows, max(PROGRAMS // d, 1)), 1),
        (x, s.K, V, W, s.P, start, head, y, states, final, begins, counts),
        (b, m, chunks, n),
        (PARTS, adjoint, accumulate, block(n), config.rows, CHUNK, config.precision, config.stages),
        config.warps,
    )


class Entrance(NamedTuple):
    """How the initial states (d, s, n) enter behind the zeros of their sequences' first chunks."""

    first: Tensor  # the tokens of these chunks, (s,)
    begin: Tensor  # their numbers among all chunks of a channel, (s,)
    token: Tensor  # each of their tokens, (s, 64), negative for the zeros before them
    state: Tensor  # (d, s, parts·n)


def entrance(h0: Tensor, x: Tensor, layout: Layout | None) -> Entrance:
    """Of some of the states, (b, d, n)."""
    s = h0.shape[0]
    if layout is None:
        length = torch.full((s,), x.shape[1], device=x.device)
        begin = torch.arange(s, device=x.device) * -(-x.shape[1] // CHUNK)
    else:
        length, begin = layout.length, layout.begin
    first = remainder(length)
    token = torch.arange(CHUNK, device=x.device) - (CHUNK - first)[:, None]
    return Entrance(first, begin, token, parts(h0.transpose(0, 1)))


def enter(s: System, z: Tensor, e: Entrance, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``start`` and ``head`` of the walk."""
    kept = (z[:, None] * e.first[:, None]).exp().to(dtype)
    outputs = (e.state @ s.W.mT).gather(2, e.token.clamp(min=0).expand(z.shape[0], -1, -1))
    return parts(kept * joined(e.state, dtype)), torch.where(e.token >= 0, outputs, 0.0)


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, z, B, C, D, h0, sequence = inputs
    reverse = options.reverse
    b = x.shape[0] if h0 is None else h0.shape[0]
    d = x.shape[2]
    if x.numel() == 0:
        return x.new_zeros(x.shape), C.new_zeros(b, *C.shape) if h0 is None else h0.clone()
    layout = None if sequence is None else packed(sequence, b, reverse)
    # Autocast would round the matrix products to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        X = time_last(x, layout, reverse)
        slices = groups(C.shape[1])
        Y = torch.empty_like(X, dtype=x.dtype if len(slices) == 1 else torch.float32)
        finals = []
        for i, g in enumerate(slices):
            s = system(z, B, C, None if i else D, g)
            final = torch.empty(d, b, s.P.shape[1], dtype=torch.float32, device=x.device)
            start = head = None
            if h0 is not None:
                start, head = enter(s, z[:, g], entrance(h0[:, :, g], x, layout), C.dtype)
            walk(X, s, C.dtype, layout, start=start, head=head, y=Y, final=final, accumulate=i > 0)
            finals.append(joined(final, C.dtype))
        h = torch.cat(finals, -1).transpose(0, 1).contiguous()
        if h0 is not None and layout is not None:
            h = torch.where((layout.chunks == 0)[:, None, None], h0, h)
        return time_second(Y, x, layout, reverse), h
