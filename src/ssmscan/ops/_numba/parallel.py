"""Kernels run on threads of our own, without Numba's parallel layers; tensors seen as flat arrays.

A kernel is compiled with ``nogil=True`` and works on one part of the output; the parts are disjoint. Numba's own layers
abort when two Python threads enter at once (workqueue) or need a system library (omp), and would change the threading
of a user's other Numba code.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork; the child makes its own when it needs them."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(kernel: Callable[..., None], parts: Sequence[tuple[int, ...]], *arguments: object) -> None:
    """Call ``kernel(*arguments, *part)`` for every part, on as many threads as PyTorch uses."""
    global _pool
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        for part in parts:
            kernel(*arguments, *part)
        return
    if _pool is None or _pool._max_workers != threads:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="ssmscan")
    for future in [_pool.submit(kernel, *arguments, *part) for part in parts]:
        future.result()


def split(n: int, d: int, widest: int = 4096, narrowest: int = 16) -> list[tuple[int, int, int]]:
    """Cut n rows of d channels into parts (row, first channel, end), enough for every thread and none too wide.

    A part keeps as many channels as it can: the processor prefetches along them.
    """
    pieces = -(-torch.get_num_threads() // max(n, 1))
    width = max(min(-(-d // pieces), widest), narrowest)
    return [(i, j, min(j + width, d)) for i in range(n) for j in range(0, d, width)]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor for a kernel to fill.

    NumPy asks the system for huge pages where PyTorch does not: the first touch of a large output costs half as much.
    """
    return torch.from_numpy(np.empty(shape, _NUMPY[dtype]))


def rows(
    tensors: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tensors (b, l, d) as flat arrays and, for each, the strides of batch and length; None is a row of ones."""
    arrays, strides = [], []
    for tensor in tensors:
        if tensor is None:
            tensor = torch.ones(shape[2], dtype=dtype).expand(*shape)
        tensor = tensor.detach().to(dtype)
        if tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        arrays.append(tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,)).numpy())
        strides.append(tensor.stride()[:2])
    return arrays, np.array(strides, dtype=np.int64)
