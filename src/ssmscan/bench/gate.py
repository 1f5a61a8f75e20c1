"""What must hold before a call is timed: it computes the right thing, at a small size and at its own."""

import torch
from torch import Tensor

from ssmscan.testing import Benchmark, Call, OpCase, Option, Size, Standard, assert_close

# The reference is a loop over time in float64. Axes that kernels are specialised for (p, n, r, c, w) stay as they are.
SMALL = {"b": 2, "l": 512, "d": 256, "h": 4, "g": 2}
# Taken off the small length for a second one, which no tile or chunk divides.
RAGGED = 13
# How many of the independent channels or heads are checked at full size.
PART = {"d": 128, "h": 4}


def small(size: Size) -> dict[str, int]:
    return {axis: min(length, SMALL.get(axis, length)) for axis, length in size.items()}


def check_small(case: OpCase, benchmark: Benchmark, backend: str, device: str) -> None:
    """Outputs and gradients against the float64 reference, at two lengths. AssertionError when they are wrong."""
    size = small(benchmark.size)
    for length in (size["l"], max(1, size["l"] - RAGGED)):
        call = case.call(benchmark.option, {**size, "l": length}).cast(benchmark.dtype)
        standard = Standard.of(call, device)
        standard.judge(call.to(device).differentiate(backend, standard.cotangents), case, benchmark.dtype)


def check_full(benchmark: Benchmark, backend: str, call: Call, dy: Tensor) -> None:
    """y and the gradients against the plain PyTorch backend in float64, in the last row of the batch.

    The last channels or heads of it stand for all where they do not mix: there an offset that overflowed would show.
    """
    parts = _channels(call.case, benchmark.option, benchmark.size)

    def part(name: str, tensor: Tensor) -> Tensor:
        if name in call.case.sequence:
            tensor = tensor[-1:]
        if name in parts:
            axis, length = parts[name]
            tensor = tensor.narrow(axis, tensor.shape[axis] - length, length)
        return tensor

    # The gradient of an argument without a batch, or shared by the channels, is a sum over more than the part.
    wrt = tuple(name for name in call.tensors if name in call.case.sequence and (name in parts or not parts))
    values = call.differentiate(backend, {"y": dy}, wrt)
    device = dy.device.type
    oracle = call.replace(**{name: part(name, t) for name, t in call.tensors.items()}).cast(torch.float64, device)
    oracles = oracle.differentiate("torch", {"y": part("x", dy).double()}, wrt)
    compared = {"y": part("x", values["y"])} | {f"d{name}": part(name, values[f"d{name}"]) for name in wrt}
    assert_close(compared, {name: oracles[name] for name in compared}, benchmark.dtype)


def _channels(case: OpCase, option: Option, size: Size) -> dict[str, tuple[int, int]]:
    """Of each argument with an axis of independent channels or heads: that axis, and how many of them to check."""
    axis = "d" if "d" in size else "h"
    if axis not in size or "x" not in case.channelwise or size.get("g", 1) > 1:
        return {}
    length = min(size[axis], PART[axis])
    one, two = (case.draw({**size, "b": 1, "l": 1, axis: n}, option) for n in (1, 2))
    return {
        name: (place, length)
        for name in one
        for place, (before, after) in enumerate(zip(one[name].shape, two[name].shape, strict=True))
        if before != after
    }
