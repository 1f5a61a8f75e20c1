"""What the tests and benchmarks need to know of s4d."""

import math
from functools import wraps

import torch

from ssmscan.ops.s4d.op import s4d, s4d_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

TENSORS = ("x", "dt", "A", "B", "C", "D")
RECURRENT = {"mode": "recurrent"}


def _real(size, generator):
    d, n = size["d"], size["n"]
    x = torch.randn(size["b"], size["l"], d, generator=generator, dtype=torch.float64)
    B, C = (torch.randn(d, n, generator=generator, dtype=torch.float64) for _ in range(2))
    # Steps from 0.001 to 0.1, so that memories reach from less than a chunk of 64 steps to several.
    dt = 10 ** (-3 + 2 * torch.rand(d, generator=generator, dtype=torch.float64))
    A = -(torch.arange(1, n + 1) + torch.rand(d, n, generator=generator, dtype=torch.float64))
    D = torch.randn(d, generator=generator, dtype=torch.float64)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}


def _complex(size, generator):
    d, n = size["d"], size["n"]
    B, C, noise = (torch.randn(d, n, generator=generator, dtype=torch.complex128) for _ in range(3))
    return {"A": torch.complex(-0.5 - noise.real.abs(), math.pi * torch.arange(n) + noise.imag), "B": B, "C": C}


def _poles(value, over_length=False):
    """Inputs whose A is ``value``, all real or all complex; ``over_length`` divides it by the number of tokens."""
    dtype = torch.complex128 if isinstance(value, complex) else torch.float64

    def inputs(size, generator):
        shape = size["d"], size["n"]
        B, C = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
        return {"A": torch.full(shape, value / (size["l"] if over_length else 1), dtype=dtype), "B": B, "C": C}

    return inputs


def _step_size(value):
    def inputs(size, generator):
        return {"dt": torch.full((size["d"],), value, dtype=torch.float64)}

    return inputs


# The step knows no mode.
@wraps(s4d_step)
def _step(*, mode="conv", **arguments):
    return s4d_step(**arguments)


REAL = Option("real", TENSORS, RECURRENT)
COMPLEX = Option("complex, no D", TENSORS[:-1], RECURRENT, inputs=_complex)
# An FFT spreads rounding errors over all tokens. It is PyTorch's on every device, packed sequences' chunks too.
CONV = Option("conv, complex", TENSORS, {"mode": "conv"}, inputs=_complex, lacks=("causal",), backends=("torch",))

CASE = OpCase(
    name="s4d",
    op=s4d,
    inputs=_real,
    options=(REAL, COMPLEX, CONV),
    # One chunk of 64 steps and a bit, several with more rows than a tile, and no more than one token.
    sizes=({"b": 2, "l": 67, "d": 2, "n": 3}, {"b": 17, "l": 129, "d": 1, "n": 2}, {"b": 5, "l": 1, "d": 2, "n": 1}),
    sequence=("x",),
    wide=("dt", "A", "B", "C", "D"),
    state=lambda size: (size["d"], size["n"]),
    step=_step,
    # Matrix products spread a NaN over a chunk of 64 tokens, before it too.
    lacks=("nan",),
    rounds=True,
    extremes={
        "A near 0": _poles(-1e-7),
        "A = 0": _poles(0.0),
        "complex A = 0": _poles(0j),
        "complex A near 0": _poles(-1e-5 + 1e-5j),
        "A imaginary": _poles(700j),
        "A > 0": _poles(20.0, over_length=True),
        "dt near 0": _step_size(1e-9),
        "dt = 30": _step_size(30.0),
    },
    refused=(
        Refusal("mode", lambda call: call.update(mode="fft"), ValueError, "mode must be"),
        Refusal("real A", lambda call: call.update(B=call["B"] + 0j, C=call["C"] + 0j), TypeError, "A must be complex"),
    ),
    large=(
        {"b": 3, "l": 1000, "d": 33, "n": 20},
        {"b": 1, "l": 64, "d": 5, "n": 64},
        {"b": 40, "l": 63, "d": 8, "n": 1},
        {"b": 2, "l": 4099, "d": 16, "n": 70},
    ),
    # The states before every chunk of 64 tokens, of the scan and its adjoint, and parts of the matrices' gradients.
    peak_memory=7.6,
    benchmarks=(
        Benchmark("conv", {"b": 8, "l": 4096, "d": 1024, "n": 64}, CONV),
        Benchmark("recurrent", {"b": 8, "l": 4096, "d": 1024, "n": 64}, COMPLEX),
        Benchmark("recurrent, real", {"b": 8, "l": 4096, "d": 1024, "n": 64}, REAL),
        Benchmark("recurrent, fp32", {"b": 8, "l": 4096, "d": 1024, "n": 64}, COMPLEX, torch.float32),
    ),
)
