"""Asking for memory long before it is loaded.

Pipelined loads reach only as far ahead as registers or shared memory hold what arrives. A request to the L2 cache holds
nothing, so that the loads after it wait for the cache alone.
"""

import triton
import triton.language as tl

from ssmscan.backend import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def fetch(pointer, rows, first, SIZE, WIDTH: tl.constexpr):
    """Ask for the elements from ``first`` to WIDTH further, none from SIZE on, of each row at ``pointer + rows``."""
    LINE: tl.constexpr = 1024 // pointer.dtype.element_ty.primitive_bitwidth
    COLUMNS: tl.constexpr = (WIDTH + LINE - 1) // LINE
    columns = tl.minimum(first + tl.arange(0, COLUMNS) * LINE, SIZE - 1)
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointer + (rows[:, None] + columns[None, :])],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
