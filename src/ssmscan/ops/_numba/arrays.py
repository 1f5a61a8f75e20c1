"""Tensors as the kernels see them: NumPy's arrays, of which those that may have strides are flat.

What is made here is on the CPU, whatever PyTorch's default device is.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from ssmscan.ops._numba.compiled import compiled

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a kernel to fill.

    NumPy asks the system for huge pages where PyTorch does not: the first touch of a large output costs half as much.
    """
    return torch.from_numpy(np.empty(shape, _NUMPY[dtype]))


def view(tensor: Tensor) -> np.ndarray:
    """What ``tensor.numpy()`` is, for tensors whose memory is not ours: that would forbid their owner to free it.

    FSDP frees the memory of a parameter between its uses.
    """
    return from_dlpack(to_dlpack(tensor)).numpy()


def read(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """What ``tensor.detach().to(dtype).numpy()`` is, at less cost where there is nothing to do.

    Each of these calls takes a microsecond all the same, and a decode step takes ten tensors.
    """
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


def filled(shape: Sequence[int], dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
    """A copy of the values, or without them zeros in this shape.

    By NumPy: where PyTorch's threads have worked they spin when ours begin.
    """
    out = empty(*(shape if values is None else values.shape), dtype=dtype)
    out.numpy()[...] = 0 if values is None else view(values.detach().to(dtype))
    return out


def owners(sequence: Tensor | None) -> np.ndarray:
    """The sequence number of each token; empty without packing."""
    return np.empty(0, np.int32) if sequence is None else sequence.numpy()


def rows(
    tensors: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tensors (b, l, d) as flat arrays and, for each, the strides of batch and length; None is a row of ones."""
    arrays, strides = [], []
    for tensor in tensors:
        if tensor is None:
            tensor = torch.ones(shape[2], dtype=dtype, device="cpu").expand(*shape)
        tensor = tensor.detach().to(dtype)
        if tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        arrays.append(tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,)).numpy())
        strides.append(tensor.stride()[:2])
    return arrays, np.array(strides, dtype=np.int64)


@compiled
def row(array, strides, i, t, first, end):
    """Of one of the arrays of :func:`rows`, the channels from ``first`` to ``end`` of a token of a batch row."""
    start = i * strides[0] + t * strides[1]
    return array[start + first : start + end]
