"""Asking for memory long before it is loaded.

Pipelined loads reach only as far ahead as registers or shared memory hold what arrives. A request to the L2 cache holds
nothing, so that the loads after it wait for the cache alone.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ssmscan.backend import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def fetch(pointer, rows, first, SIZE, WIDTH: tl.constexpr):
    """Ask for the elements from ``first`` to WIDTH further, none from SIZE on, of each row at ``pointer + rows``."""
    LINE: tl.constexpr = 1024 // pointer.dtype.element_ty.primitive_bitwidth
    COLUMNS: tl.constexpr = (WIDTH + LINE - 1) // LINE
    columns = tl.minimum(first + tl.arange(0, COLUMNS) * LINE, SIZE - 1)
    # Of Blackwell's tensor memory products are pipelined in a way of their own, in which Triton 3.7 has no place for an
    # instruction without a result. That is of compute capability 10 and 11; 12 has none.
    if not _INTERPRET and (not cuda_capability_geq(10) or cuda_capability_geq(12)):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointer + (rows[:, None] + columns[None, :])],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
