"""Activations of a few instructions each."""

import triton
import triton.language as tl

from ssmscan.backend import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) for float32, to a few units in the last place; below 1e-38 it is 0.

    ``tl.sigmoid`` takes three times the instructions, to keep numbers below 1e-38.
    """
    if _INTERPRET:
        gate = tl.sigmoid(z)
    else:
        gate = tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [z * -_LOG2E],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return gate
