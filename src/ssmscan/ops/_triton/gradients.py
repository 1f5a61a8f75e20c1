"""What the backwards share: room for gradients, and the sums of their parts in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel, padded

# Elements that a program of the sums takes at a time, and at most so many rows of them.
TILE = 2048
ROWS = 64


def room(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """An empty tensor like each of ``tensors`` whose gradient is needed."""
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=False)
    ]


def state_room(h0: Tensor | None, dh: Tensor | None, need: bool, passes: bool) -> Tensor | None:
    """Room for the gradient of h0. The state of an empty sequence ``passes`` through; a kernel writes the others."""
    if h0 is None or not need:
        return None
    if not passes:
        return h0.new_empty(h0.shape, dtype=torch.float32)
    return torch.zeros_like(h0, dtype=torch.float32) if dh is None else dh.to(torch.float32, copy=True).contiguous()


def rows(part: slice | None, *tensors: Tensor | None) -> list[Any]:
    """This part of the batch rows of each tensor, or all."""
    return list(tensors) if part is None else [t if t is None else t[part] for t in tensors]


@kernel(do_not_specialize=["size"])
def add_into(total, part, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(total + i, mask=i < size, other=0.0).to(tl.float32)
    b = tl.load(part + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(total + i, (a + b).to(total.dtype.element_ty), mask=i < size)


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Add to a contiguous ``total`` a ``part`` in the same layout, in one launch."""
    if total is None or part is None:
        return part if total is None else total
    size = total.numel()
    if size > 0:
        add_into.launch((-(-size // TILE), 1, 1), (total, part), (size,), (TILE,), 4)
    return total


@triton.jit
def _store(out, column, inside, total, first, length, K: tl.constexpr):
    """Of the columns from ``first`` on, a matrix (K, length / K), the transpose goes to ``out``."""
    at = column - first
    mask = inside & (at >= 0) & (at < length)
    if K > 1:
        width = length // K
        at = at % width * K + at // width
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R"])
def row_sums(parts, a, b, c, R, A, B, C, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    # Each of the lengths may fit into 32 bits, and their sum not.
    width = tl.cast(A, tl.int64) + B + C
    inside = column < width
    total = tl.zeros((BC,), tl.float32)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        pointers = parts + row.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.sum(tl.load(pointers, mask=(row < R)[:, None] & inside[None, :], other=0.0), 0)
    if a is not None:
        _store(a, column, inside, total, 0, A, K)
    if b is not None:
        _store(b, column, inside, total, A, B, 1)
    if c is not None:
        _store(c, column, inside, total, width - C, C, 1)


def sum_rows(
    parts: Tensor, lengths: tuple[int, int, int], outputs: tuple[Tensor | None, ...], transposed: int = 1
) -> None:
    """Sum the rows of ``parts``, (R, columns) in float32, always in the same order, in one launch.

    As many columns as the ``lengths`` say go to each of three outputs, in its dtype. The columns of the first are a
    matrix with so many rows, which is stored ``transposed``.
    """
    rows = parts.shape[0]
    BR = min(padded(rows), ROWS)
    BC = TILE // BR
    row_sums.launch((-(-sum(lengths) // BC), 1, 1), (parts, *outputs), (rows, *lengths), (transposed, BR, BC), 4)
