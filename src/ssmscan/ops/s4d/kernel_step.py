"""The decode step of s4d in one launch: the zero-order hold, the state, and the output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops.s4d.kernel_system import multiply

# States of a program, over its channels, of each batch row; a thread takes four.
STATES = 512
WARPS = 4
# Programs that fill the device. More rows of the batch than these need are walked by one program, one after the other:
# the system is discretised in float64, once for all of them.
PROGRAMS = 1056

_TURNS = tl.constexpr(0.15915494309189535)
_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _to(a, DTYPE: tl.constexpr):
    return a[0].to(DTYPE), a[1].to(DTYPE)


@triton.jit
def _tile(pointer, channels, channel_step, states, state_step, PARTS: tl.constexpr):
    """Pointers to [channels, states] of a real tensor, or to both parts of a complex one."""
    offset = (channels[:, None] * channel_step + states[None, :] * state_step) * PARTS
    return pointer + (offset[:, :, None] + tl.arange(0, 2)[None, None, :] if PARTS == 2 else offset)


@triton.jit
def _load(pointers, mask, PARTS: tl.constexpr):
    """Real and imaginary parts. A real system is computed as a complex one without imaginary parts."""
    if PARTS == 2:
        real, imaginary = tl.split(tl.load(pointers, mask=mask[:, :, None], other=0.0))
    else:
        real = tl.load(pointers, mask=mask, other=0.0)
        imaginary = tl.zeros_like(real)
    return real, imaginary


@triton.jit
def _store(pointers, value, mask, PARTS: tl.constexpr):
    if PARTS == 2:
        tl.store(pointers, tl.join(value[0], value[1]), mask=mask[:, :, None])
    else:
        tl.store(pointers, value[0], mask=mask)


@triton.jit
def _root_of_turn(angle):
    """exp(i·angle/2) in float64, with an error of 1e-9; the angle may be many turns, after which the sign is lost."""
    reduced = angle - tl.floor(angle * _TURNS + 0.5) * _TURN
    f = reduced * (1 / 16)
    v = f * f
    c = 1 - v * (1 / 2) * (1 - v * (1 / 12) * (1 - v * (1 / 30)))
    s = f * (1 - v * (1 / 6) * (1 - v * (1 / 20) * (1 - v * (1 / 42))))
    for _ in tl.static_range(3):
        c, s = multiply((c, s), (c, s))
    return c, s


@triton.jit
def _hold(step, A, PARTS: tl.constexpr):
    """exp(z) and (exp(z) - 1)/A of z = dt·A, in float64, from s = z/2; rounded to float32, to its last digit."""
    z = step * A[0], step * A[1]
    s = z[0] * 0.5, z[1] * 0.5
    size = tl.exp(s[0])
    root = size, tl.zeros_like(size)
    if PARTS == 2:
        c, i = _root_of_turn(z[1])
        root = size * c, size * i
    decay = multiply(root, root)
    # Where z is small, dt·exp(s)·sinh(s)/s by the series of sinh: it holds at A = 0 too, and does not cancel.
    u = multiply(s, s)
    t = multiply(u, (1 + u[0] * (1 / 42), u[1] * (1 / 42)))
    t = multiply(u, (1 + t[0] * (1 / 20), t[1] * (1 / 20)))
    series = multiply(root, (1 + t[0] * (1 / 6), t[1] * (1 / 6)))
    small = s[0] * s[0] + s[1] * s[1] < 0.0625
    inverse = 1 / tl.where(small, 1.0, A[0] * A[0] + A[1] * A[1])
    quotient = multiply((decay[0] - 1, decay[1]), (A[0] * inverse, -A[1] * inverse))
    return decay, (tl.where(small, step * series[0], quotient[0]), tl.where(small, step * series[1], quotient[1]))


@kernel(do_not_specialize=["L", "pool", "batch", "rows"])
def s4d_tokens(
    # read; h is overwritten
    x, dt, A, B, C, D, h, state_indices,
    # written
    y,
    # sizes
    L, pool, batch, rows, d, n,
    # strides
    x_batch, x_time, x_channel, A_channel, A_state, B_channel, B_state, C_channel, C_state, h_row, h_channel, h_state,
    # constants
    PARTS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for L tokens and BD channels of some rows of the batch; the states are advanced in place."""
    blocks = tl.cdiv(d, BD)
    channels = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    first = tl.program_id(0) // blocks * rows
    inside = channels < d
    states = tl.arange(0, N).to(tl.int64)
    known = inside[:, None] & (states < n)[None, :]

    step = tl.load(dt + channels, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    poles = _to(_load(_tile(A, channels, A_channel, states, A_state, PARTS), known, PARTS), tl.float32)
    decay, gain = _hold(step[:, None], _to(poles, tl.float64), PARTS)
    a = _to(decay, tl.float32)
    b = _to(_load(_tile(B, channels, B_channel, states, B_state, PARTS), known, PARTS), tl.float32)
    b = multiply(_to(gain, tl.float32), b)
    c = _to(_load(_tile(C, channels, C_channel, states, C_state, PARTS), known, PARTS), tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)

    for row in range(first, min(first + rows, batch)):
        at = tl.cast(row, tl.int64)
        number, taken = pool_row(state_indices, at, pool)
        pointers = _tile(h + number * h_row * PARTS, channels, h_channel, states, h_state, PARTS)
        state = _load(pointers, known & taken, PARTS)
        for t in range(L):
            u = tl.load(x + at * x_batch + tl.cast(t, tl.int64) * x_time + channels * x_channel, mask=inside, other=0.0)
            u = u.to(tl.float32)
            before = _to(state, tl.float32)
            # Spelled out, to round the same for every token.
            now = (
                tl.fma(a[0], before[0], tl.fma(-a[1], before[1], b[0] * u[:, None])),
                tl.fma(a[0], before[1], tl.fma(a[1], before[0], b[1] * u[:, None])),
            )
            part = c[0] * now[0]
            if PARTS == 2:
                # Of each state a conjugate is left out.
                part = 2 * (part - c[1] * now[1])
            # A state that does not exist is NaN where the input is infinite.
            out = tl.sum(tl.where(known, part, 0.0), 1)
            if D is not None:
                out += skip * u
            out = tl.where(taken, out, 0.0)
            tl.store(y + (at * L + t) * d + channels, out.to(y.dtype.element_ty), mask=inside)
            state = _to(now, h.dtype.element_ty)
        _store(pointers, state, known & taken, PARTS)


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor, state_indices: Tensor | None
) -> Tensor:
    if h.is_conj():
        # What lies in memory is the state of the conjugated system, which has the same outputs.
        A, B, C, h = A.conj(), B.conj(), C.conj(), h.conj()
    batch, d = x.shape[0], x.shape[-1]
    n = A.shape[1]
    PARTS = 1 + A.is_complex()
    N = padded(n)
    BD = max(STATES // N, 1)
    blocks = -(-d // BD)
    rows = max(batch * blocks // PROGRAMS, 1)
    return launch(
        s4d_tokens,
        blocks * -(-batch // rows),
        x.shape[1] if x.dim() == 3 else 1,
        (x, dt.contiguous(), *map(_in_parts, (A, B, C)), None if D is None else D.contiguous()),
        _in_parts(h),
        state_indices,
        (batch, rows, d, n, *token_strides(3, x), *A.stride(), *B.stride(), *C.stride(), *h.stride()),
        (PARTS, N, BD),
        WARPS,
    )


def _in_parts(t: Tensor) -> Tensor:
    """A complex tensor with a last axis of real and imaginary parts; a real one as it is."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
