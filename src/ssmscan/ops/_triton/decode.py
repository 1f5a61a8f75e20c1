"""What the kernels of the decode steps share.

A kernel takes one token or several, one after the other, with the state in registers: there in its own dtype, to which
it is rounded after every token, so that several tokens at once leave the same bits as one at a time.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.launch import Kernel


def token_strides(rank: int, *tensors: Tensor | None) -> tuple[int, ...]:
    """The strides of each tensor (b, l, ...) in turn, ``rank`` numbers; one token has no l, whose stride is 0 then.

    All are, of no tensor.
    """
    strides: list[int] = []
    for tensor in tensors:
        own = (0,) * rank if tensor is None else tensor.stride()
        strides += own if len(own) == rank else (own[0], 0, *own[1:])
    return tuple(strides)


def launch(
    kernel: Kernel,
    programs: int,
    l: int,
    read: tuple[Tensor | None, ...],
    h: Tensor,
    state_indices: Tensor | None,
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> Tensor:
    """Advance the state ``h`` by l tokens and return y, in the shape of the first tensor.

    The kernel takes the tensors ``read``, h, the indices and y; l, the rows of h and the integers; and the constants.
    """
    x = read[0]
    assert x is not None
    y = x.new_empty(*x.shape)
    if y.numel() > 0:
        if state_indices is not None:
            state_indices = state_indices.contiguous()
        tensors = (*read, h, state_indices, y)
        kernel.launch((programs, 1, 1), tensors, (l, h.shape[0], *integers), constants, warps)
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y


@triton.jit
def pool_row(state_indices, batch, rows):
    """Of ``rows`` states, which one a batch row reads and writes, its own without indices; and whether there is one."""
    if state_indices is None:
        row = batch
    else:
        row = tl.load(state_indices + batch).to(tl.int64)
    return row, (row >= 0) & (row < rows)
