"""The chunk walk of s4d on tensor cores, and the forward launcher.

One program walks the chunks of 64 steps of one channel, for 16 rows of the batch at a time. Its matrices (see
``kernel_system``) stay on the multiprocessor, and the state in registers. With x a chunk's inputs, (rows, 64), and T
the Toeplitz matrix of the impulse response K,

    y = x T + h W,    h ← P h + x V.

The adjoint is a walk of the same form from the last chunk to the first, on the incoming gradient, with T transposed, V
and W exchanged and P conjugated. The first chunk is filled up with zeros in front. The initial state enters behind
these, so the walk starts from zero, is given what the state is at the end of the first chunk as ``start``, and what it
adds to the first chunk's outputs as ``head``.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.s4d.autograd import Inputs, Options
from ssmscan.ops.s4d.configs import walk_for
from ssmscan.ops.s4d.kernel_system import System, block, system
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


@kernel(do_not_specialize=["b", "m"])
def s4d_walk(
    x, K, V, W, P, start, head, y, states, final,
    b, m, n,
    PARTS: tl.constexpr, ADJOINT: tl.constexpr, ACCUMULATE: tl.constexpr, NB: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk m chunks for every ``splits``-th tile of the batch; ``states`` are those that enter the chunks."""
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
        row = channel * b + row
        h = tl.zeros((R, NB), tl.float32)
        h_i = h
        if ADJOINT and start is not None:
            h, h_i = _load_state(start, row, inside, state, n, PARTS)
        tokens = row[:, None] * (tl.cast(m, tl.int64) * Q) + q[None, :]
        for step in tl.range(0, m, num_stages=STAGES):
            chunk = m - 1 - step if ADJOINT else step
            here = tokens + chunk * Q
            u = tl.load(x + here, mask=inside[:, None], other=0.0).to(tl.float32)
            if states is not None:
                _store_state(states, row * m + chunk, inside, state, n, h, h_i, PARTS)
            if y is not None:
                out = product(u, t, PRECISION) + product(h, w, PRECISION)
                if PARTS == 2:
                    out += product(h_i, w_i, PRECISION)
                if head is not None:
                    out += tl.load(head + row[:, None] * Q + q[None, :], mask=inside[:, None] & (chunk == 0), other=0.0)
                if ACCUMULATE:
                    out += tl.load(y + here, mask=inside[:, None], other=0.0)
                tl.store(y + here, out.to(y.dtype.element_ty), mask=inside[:, None])
            s = product(u, v, PRECISION)
            if PARTS == 2:
                s_i = product(u, v_i, PRECISION)
                h, h_i = p[None, :] * h - p_i[None, :] * h_i + s, p[None, :] * h_i + p_i[None, :] * h + s_i
            else:
                h = p[None, :] * h + s
                h_i = h
            if start is not None and not ADJOINT:
                e, e_i = _load_state(start, row, inside & (chunk == 0), state, n, PARTS)
                h += e
                h_i += e_i
        if final is not None:
            _store_state(final, row, inside, state, n, h, h_i, PARTS)


def parts(t: Tensor) -> Tensor:
    """(..., n) complex as (..., 2n), the real parts first; a real tensor as it is. Contiguous."""
    return torch.cat([t.real, t.imag], -1) if t.is_complex() else t.contiguous()


def joined(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`parts`, if ``dtype`` is complex."""
    return torch.complex(*t.chunk(2, -1)) if dtype.is_complex else t


def groups(x: Tensor, C: Tensor) -> list[slice]:
    """The states of each walk."""
    n, most = C.shape[1], walk_for(x, C.dtype).states
    return [slice(i, min(i + most, n)) for i in range(0, max(n, 1), most)]


def time_last(x: Tensor) -> Tensor:
    """(b, l, d) as (d, b, 64·m), with zeros before the first token."""
    b, l, d = x.shape
    padding = -l % CHUNK
    result = x.new_empty(d, b, l + padding)
    result[:, :, :padding] = 0
    result[:, :, padding:] = x.permute(2, 0, 1)
    return result


def time_second(y: Tensor, l: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`time_last`."""
    result = y.new_empty(y.shape[1], l, y.shape[0], dtype=dtype)
    return result.copy_(y[:, :, y.shape[2] - l :].permute(1, 2, 0))


def walk(
    x: Tensor,
    s: System,
    dtype: torch.dtype,
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
    PARTS = 1 + dtype.is_complex
    n = s.P.shape[1] // PARTS
    config = walk_for(x, dtype).config
    rows = -(-b // config.rows)
    V, W = (s.W, s.V) if adjoint else (s.V, s.W)
    s4d_walk.launch(
        (d, min(rows, max(PROGRAMS // d, 1)), 1),
        (x, s.K, V, W, s.P, start, head, y, states, final),
        (b, length // CHUNK, n),
        (PARTS, adjoint, accumulate, block(n), config.rows, CHUNK, config.precision, config.stages),
        config.warps,
    )


def entrance(s: System, z: Tensor, h0: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """``start`` and ``head`` of h0, (d, b, n), before a chunk of ``first`` tokens, and W of these tokens."""
    W = F.pad(s.W[:, :first], (0, 0, CHUNK - first, 0))
    start = (z * first).exp().to(h0.dtype)[:, None] * h0
    return parts(start), parts(h0) @ W.mT, W


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, z, B, C, D, h0 = inputs
    b, l, d = x.shape
    if b * l * d == 0:
        return x.new_zeros(b, l, d), C.new_zeros(b, *C.shape) if h0 is None else h0.clone()
    # Autocast would round the matrix products to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        X = time_last(x)
        slices = groups(x, C)
        Y = torch.empty_like(X, dtype=x.dtype if len(slices) == 1 else torch.float32)
        finals = []
        for i, g in enumerate(slices):
            s = system(z, B, C, None if i else D, g)
            final = torch.empty(d, b, s.P.shape[1], dtype=torch.float32, device=x.device)
            start = head = None
            if h0 is not None:
                start, head, _ = entrance(s, z[:, g], h0[:, :, g].transpose(0, 1), (l - 1) % CHUNK + 1)
            walk(X, s, C.dtype, start=start, head=head, y=Y, final=final, accumulate=i > 0)
            finals.append(joined(final, C.dtype))
        return time_second(Y, l, x.dtype), torch.cat(finals, -1).transpose(0, 1).contiguous()
