"""The matrices of 64 steps, and the gradients through them; see ``system`` for what they are.

One program makes those of a channel. A real system is computed as a complex one without imaginary parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops.s4d.system import CHUNK

WARPS = 8
# States of a program in the backward, whose tiles would not fit into registers otherwise.
BACKWARD_STATES = 32

_TURNS = tl.constexpr(0.15915494309189535)
_TURN = tl.constexpr(6.283185307179586)


class System(NamedTuple):
    """Of up to 64 states; complex matrices with all real parts before the imaginary ones."""

    K: Tensor  # (d, 64)
    V: Tensor  # (d, 64, parts·n)
    W: Tensor
    P: Tensor  # (d, parts·n)


@triton.jit
def multiply(a, b):
    """The product of complex numbers, in two parts each."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def _conjugate(a):
    return a[0], -a[1]


@triton.jit
def _rows(a):
    """A row of states, for every step."""
    return a[0][None, :], a[1][None, :]


@triton.jit
def _load(pointer, offset, imaginary, mask, PARTS: tl.constexpr):
    real = tl.load(pointer + offset, mask=mask, other=0.0)
    if PARTS == 2:
        other = tl.load(pointer + offset + imaginary, mask=mask, other=0.0)
    else:
        other = tl.zeros_like(real)
    return real, other


@triton.jit
def _store(pointer, offset, imaginary, value, mask, PARTS: tl.constexpr):
    tl.store(pointer + offset, value[0], mask=mask)
    if PARTS == 2:
        tl.store(pointer + offset + imaginary, value[1], mask=mask)


@triton.jit
def _power(z, exponent):
    """exp(exponent · z) in float32. The angle is reduced in float64: it may be many turns."""
    size = tl.exp2((z[0] * exponent * LOG2E).to(tl.float32))
    turns = z[1] * exponent * _TURNS
    angle = (turns - tl.floor(turns)).to(tl.float32) * _TURN
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def _matrices(z, B, C, channel, first, total, state, known, PARTS: tl.constexpr, Q: tl.constexpr):
    """Ā^0 … Ā^63, Ā^1 … Ā^64 without weights, Ā^64, B̄ and the weighted C of the states from ``first``."""
    offset = (channel * total + first + state) * PARTS
    z = _load(z, offset, 1, known, PARTS)
    b = _load(B, offset, 1, known, PARTS)
    c = _load(C, offset, 1, known, PARTS)
    k = tl.arange(0, Q).to(tl.float64)
    powers = _power(_rows(z), k[:, None])
    following = multiply(_rows(_power(z, 1.0)), powers)
    return powers, following, _power(z, Q * 1.0), b, (c[0] * PARTS, c[1] * PARTS)


@kernel(do_not_specialize=["first"])
def s4d_system(
    z, B, C, D, K, V, W, P, first, total, n, PARTS: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    state = tl.arange(0, NB)
    known = state < n
    powers, following, last, b, c = _matrices(z, B, C, channel, first, total, state, known, PARTS, Q)
    by_time = (channel * Q + q[:, None]) * (PARTS * n) + state[None, :]
    against_time = (channel * Q + Q - 1 - q[:, None]) * (PARTS * n) + state[None, :]
    mask = known[None, :]
    _store(V, against_time, n, multiply(powers, _rows(b)), mask, PARTS)
    # The real part of a product is a product of parts with the conjugate.
    _store(W, by_time, n, _conjugate(multiply(following, _rows(c))), mask, PARTS)
    _store(P, channel * PARTS * n + state, n, last, known, PARTS)
    response = tl.sum(multiply(powers, _rows(multiply(b, c)))[0], 1)
    if D is not None:
        response += tl.where(q == 0, tl.load(D + channel), 0.0)
    tl.store(K + channel * Q + q, response)


@kernel(do_not_specialize=["first"])
def s4d_system_backward(
    z, B, C, dT, dV, dW, dP, dz, dB, dC, dK, first, total, n,
    PARTS: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """dz, dB, dC and dK from the gradients of the matrices, T among them in K's stead; for NB of the states."""
    channel = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    state = tl.program_id(1) * NB + tl.arange(0, NB)
    known = state < n
    powers, following, last, b, c = _matrices(z, B, C, channel, first, total, state, known, PARTS, Q)
    # T_ji = K_{i-j}: the gradient of K is the sums along the diagonals.
    column = q[:, None] + q[None, :]
    dk = tl.sum(tl.load(dT + channel * Q * Q + q[None, :] * Q + column, mask=column < Q, other=0.0), 1)
    tl.store(dK + channel * Q + q, dk, mask=(q < Q) & (tl.program_id(1) == 0))

    by_time = (channel * Q + q[:, None]) * (PARTS * n) + state[None, :]
    against_time = (channel * Q + Q - 1 - q[:, None]) * (PARTS * n) + state[None, :]
    mask = known[None, :]
    dv = _load(dV, against_time, n, mask, PARTS)
    du = _conjugate(_load(dW, by_time, n, mask, PARTS))
    dp = _load(dP, channel * PARTS * n + state, n, known, PARTS)

    # Of Ā^k itself, through V and K; of Ā^(k+1), through W.
    powers, following, last = _conjugate(powers), _conjugate(following), _conjugate(last)
    by_v = multiply(powers, dv)
    by_k = powers[0] * dk[:, None], powers[1] * dk[:, None]
    by_w = multiply(following, du)
    sum_v = tl.sum(by_v[0], 0), tl.sum(by_v[1], 0)
    sum_k = tl.sum(by_k[0], 0), tl.sum(by_k[1], 0)
    sum_w = tl.sum(by_w[0], 0), tl.sum(by_w[1], 0)
    b, c = _conjugate(b), _conjugate(c)
    through_b = multiply(b, sum_k)
    through_c = multiply(c, sum_k)
    offset = (channel * total + first + state) * PARTS
    _store(dB, offset, 1, (sum_v[0] + through_c[0], sum_v[1] + through_c[1]), known, PARTS)
    # c is PARTS times C.
    _store(
        dC, offset, 1, ((sum_w[0] + through_b[0]) * PARTS, (sum_w[1] + through_b[1]) * PARTS), known, PARTS
    )  # fmt: skip
    k = q.to(tl.float32)[:, None]
    v = multiply(b, (tl.sum(k * by_v[0], 0), tl.sum(k * by_v[1], 0)))
    t = multiply(multiply(b, c), (tl.sum(k * by_k[0], 0), tl.sum(k * by_k[1], 0)))
    w = multiply(c, (tl.sum((k + 1) * by_w[0], 0), tl.sum((k + 1) * by_w[1], 0)))
    p = multiply(last, dp)
    dz_r, dz_i = v[0] + t[0] + w[0] + Q * p[0], v[1] + t[1] + w[1] + Q * p[1]
    _store(dz, offset, 1, (dz_r, dz_i), known, PARTS)


def block(n: int) -> int:
    """The columns of a tile of n states."""
    return max(padded(n), 16)


def system(z: Tensor, B: Tensor, C: Tensor, D: Tensor | None, states: slice) -> System:
    """The matrices of some of the states."""
    d, total = C.shape
    n = states.stop - states.start
    PARTS = 1 + C.is_complex()
    shapes = ((d, CHUNK), (d, CHUNK, PARTS * n), (d, CHUNK, PARTS * n), (d, PARTS * n))
    s = System(*(torch.empty(shape, dtype=torch.float32, device=C.device) for shape in shapes))
    z, B, C = (_real_view(t) for t in (z, B, C))
    D = D if D is None else D.contiguous()
    s4d_system.launch((d, 1, 1), (z, B, C, D, *s), (states.start, total, n), (PARTS, block(n), CHUNK), WARPS)
    return s


def system_backward(
    z: Tensor,
    B: Tensor,
    C: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    states: slice,
) -> Tensor:
    """dK, (d, 64), and in ``outputs`` dz, dB and dC, from the ``gradients`` of T, V, W and P."""
    d, total = C.shape
    n = states.stop - states.start
    PARTS = 1 + C.is_complex()
    dK = torch.empty(d, CHUNK, dtype=torch.float32, device=C.device)
    tensors = (*(_real_view(t) for t in (z, B, C)), *gradients, *(_real_view(t) for t in outputs), dK)
    NB = min(block(n), BACKWARD_STATES)
    grid = (d, max(triton.cdiv(n, NB), 1), 1)
    s4d_system_backward.launch(grid, tensors, (states.start, total, n), (PARTS, NB, CHUNK), WARPS)
    return dK


def _real_view(t: Tensor) -> Tensor:
    t = t.resolve_conj().contiguous()
    return torch.view_as_real(t) if t.is_complex() else t
