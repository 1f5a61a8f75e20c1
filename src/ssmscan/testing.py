"""What the tests and benchmarks share: the description of an operation, error bounds, and runs that collect gradients.

An operation is tested and timed the moment its :class:`OpCase` stands in ``ops/<name>/case.py`` and in
``ssmscan.ops.cases``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# Axis letter to length, as in {"b": 2, "l": 37, "d": 5}.
Size = Mapping[str, int]

# Largest root-mean-square error over the root-mean-square of the float64 oracle.
RMS_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Option:
    """One way to call an operation: which tensors are given, and with which further keywords."""

    name: str
    tensors: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Benchmark:
    """One row of an operation's benchmark table."""

    variant: str
    size: Size
    option: Option
    dtype: torch.dtype = torch.bfloat16
    graph: bool = False  # time the replay of a CUDA graph: for shapes whose launches cost more than their work


@dataclass(frozen=True)
class OpCase:
    """All that the conformance suite and the benchmarks need to know of one operation."""

    name: str
    op: Callable[..., Any]
    # Every tensor argument but the state, optional ones included: float64, on the CPU, drawn from the generator.
    inputs: Callable[[Size, torch.Generator], dict[str, Tensor]]
    options: tuple[Option, ...]
    sizes: tuple[Size, ...]
    # Arguments with the length on axis 1; the others (A, D, weights) hold for all time.
    sequence: tuple[str, ...]
    # Arguments that stay float32 when the others are bfloat16 or float16.
    wide: tuple[str, ...] = ()
    # The state's shape after its first axis; None when the operation returns y alone.
    state: Callable[[Size], tuple[int, ...]] | None = None
    # Arguments in which y and the final state are jointly linear; with a state, h0 belongs to them by itself.
    linear: tuple[str, ...] = ("x",)
    causal: bool = True
    step: Callable[..., Tensor] | None = None
    backends: tuple[str, ...] = ("torch", "cpu", "triton")
    # Named inputs at the edges of the domain (a = 0, huge dt, ...), which replace those of ``inputs``.
    extremes: Mapping[str, Callable[[Size, torch.Generator], dict[str, Tensor]]] = field(default_factory=dict)
    # What must be refused: a name, a function that changes the keywords of a good call, the error and a part of it.
    refused: tuple[tuple[str, Callable[[dict[str, Any]], None], type[Exception], str], ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()

    def draw(self, size: Size, option: Option, seed: int = 0, extreme: str | None = None) -> dict[str, Tensor]:
        """The tensors of ``option`` in float64; ``h0`` is added by the caller."""
        generator = torch.Generator().manual_seed(seed)
        tensors = self.inputs(size, generator)
        if extreme is not None:
            tensors |= self.extremes[extreme](size, generator)
        return {name: tensors[name] for name in option.tensors}

    def draw_state(self, size: Size, count: int, seed: int = 1) -> Tensor:
        """An initial state for ``count`` sequences, float64."""
        assert self.state is not None, f"{self.name} has no state"
        return torch.randn(count, *self.state(size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def cast(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """``tensors`` as a user would pass them at ``dtype``: states and ``wide`` arguments no narrower than float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: tensor.to(device, wide if name in self.wide or name == "h0" else dtype)
            for name, tensor in tensors.items()
        }


def rms_ratio(value: Tensor, oracle: Tensor) -> float:
    """Root-mean-square of the error over that of the oracle, in float64; not finite unless all of ``value`` is."""
    value, oracle = value.detach().double().cpu(), oracle.detach().double().cpu()
    assert value.shape == oracle.shape, f"{tuple(value.shape)} against the oracle's {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return 0.0
    norm = oracle.square().mean().sqrt()
    return ((value - oracle).square().mean().sqrt() / norm.clamp(min=torch.finfo(torch.float64).tiny)).item()
