"""Activations of a few instructions each."""

import triton
import triton.language as tl

from ssmscan.backend import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(v):
    """2^v for float32, to a few units in the last place; below 1e-38 it is 0, which saves four instructions."""
    if _INTERPRET:
        power = tl.exp2(v)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def exp(z):
    """exp(z) as :func:`exp2` has it."""
    if _INTERPRET:
        power = tl.exp(z)
    else:
        power = exp2(z * LOG2E)
    return power


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) for float32, to a few units in the last place; below 1e-38 it is 0.

    ``tl.sigmoid`` takes three times the instructions, to keep numbers below 1e-38.
    """
    if _INTERPRET:
        e = tl.exp(-tl.abs(z))
        gate = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
    else:
        gate = tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [z * -LOG2E],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return gate


@triton.jit
def _reciprocal(v):
    """1 / v for v from 2 to 3, to a unit in the last place: a division takes five instructions more."""
    if _INTERPRET:
        r = 1.0 / v
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    return r


@triton.jit
def softplus(z):
    """max(z, 0) + log1p(e), where e = exp(-|z|) and log1p(e) = 2·atanh(e / (2 + e)), to float32's precision."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    s = e * _reciprocal(2.0 + e)
    # 2·atanh(s)/s in powers of s² up to 1/9, relative error 4e-9.
    s2 = s * s
    p = 0.28157778 * s2 + 0.27965158
    p = p * s2 + 0.40024595
    p = p * s2 + 0.66666322
    p = p * s2 + 2.00000001
    return tl.maximum(z, 0.0) + s * p
