"""Launching a kernel at little host cost.

Triton binds and specialises every argument at every launch, about 30 µs for twenty of them. A :class:`Kernel` keeps the
compiled kernel under all that its specialisation can depend on and launches it directly the next time.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ssmscan.ops._triton.record import recorder


def kinds(tensors: Sequence[Tensor | None], pointers: Sequence[int | None]) -> tuple:
    """What Triton specialises pointers on: their dtype and alignment, and whether there is one."""
    return tuple([p if p is None else (t.dtype, p % 16) for t, p in zip(tensors, pointers)])  # noqa: B905


@lru_cache(maxsize=1 << 14)
def specialised(integers: tuple[int, ...]) -> tuple[int, ...]:
    """What Triton specialises integers on: whether each is 1, divisible by 16, or over 32 bits."""
    return tuple([(v == 1) + 2 * (v % 16 == 0) + 4 * (not -(1 << 31) <= v < 1 << 31) for v in integers])


class Kernel:
    """A ``@triton.jit`` function that remembers what it compiled."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[tuple, Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,
    ) -> None:
        """Run on the device of the first tensor; the function takes tensors, integers and constants in this order.

        A thread gets at most so many ``registers``, so that more warps fit; None leaves that to the compiler.
        """
        device = tensors[0].device
        if device.type != "cuda":
            self.function[grid](*tensors, *integers, *constants, num_warps=warps)
            return
        index = device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self.launch(grid, tensors, integers, constants, warps, registers)
            return
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        key = (index, kinds(tensors, pointers), specialised(integers), constants, warps, registers)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.compiled[key] = self.function[grid](
                *tensors, *integers, *constants, num_warps=warps, maxnreg=registers
            )
        else:
            stream = torch._C._cuda_getCurrentRawStream(index)
            compiled.run(
                *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *pointers, *integers, *constants,
            )  # fmt: skip
        watch = recorder()
        if watch is not None:
            watch.launched(compiled, grid, tensors, (*integers, *constants))


def kernel(do_not_specialize: list[str]) -> Callable[[Callable], Kernel]:
    """``@triton.jit``, launched through :class:`Kernel`."""
    return lambda function: Kernel(triton.jit(function, do_not_specialize=do_not_specialize))


def padded(n: int) -> int:
    """The least power of two that is not below n. Triton's own function takes some µs on the host."""
    return 1 << max(n - 1, 0).bit_length()
