"""What the tests and benchmarks need to know of causal_conv1d."""

import torch

from ssmscan.ops.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

SILU = Option("bias, silu", ("x", "weight", "bias"), {"activation": "silu"}, lacks=("linear",))
PLAIN = Option("plain", ("x", "weight"))


def _inputs(size, generator):
    b, l, d, w = size["b"], size["l"], size["d"], size["w"]
    return {
        "x": torch.randn(b, l, d, generator=generator, dtype=torch.float64),
        "weight": torch.randn(d, w, generator=generator, dtype=torch.float64),
        "bias": torch.randn(d, generator=generator, dtype=torch.float64),
    }


def _saturated(size, generator):
    """The activation far out on both sides."""
    return {"x": 100 * torch.randn(size["b"], size["l"], size["d"], generator=generator, dtype=torch.float64)}


CASE = OpCase(
    name="causal_conv1d",
    op=causal_conv1d,
    inputs=_inputs,
    options=(SILU, PLAIN),
    # The third is shorter than the width.
    sizes=({"b": 2, "l": 19, "d": 5, "w": 4}, {"b": 1, "l": 16, "d": 33, "w": 2}, {"b": 3, "l": 3, "d": 3, "w": 8}),
    sequence=("x",),
    state=lambda size: (size["w"] - 1, size["d"]),
    step=causal_conv1d_step,
    extremes={
        "x = 0": lambda size, _: {"x": torch.zeros(size["b"], size["l"], size["d"], dtype=torch.float64)},
        "silu saturated": _saturated,
    },
    refused=(
        Refusal(
            "width 1", lambda call: call.update(weight=call["weight"][:, :1], h0=None), ValueError, "width w of 2 to 8"
        ),
        Refusal("width 9", lambda call: call.update(weight=torch.ones(5, 9), h0=None), ValueError, "width w of 2 to 8"),
        Refusal("activation", lambda call: call.update(activation="gelu"), ValueError, "activation"),
    ),
    # Around the rows of a tile and the channels of a program.
    large=(
        {"b": 2, "l": 100, "d": 33, "w": 4},
        {"b": 3, "l": 1, "d": 64, "w": 4},
        {"b": 1, "l": 15, "d": 130, "w": 2},
        {"b": 2, "l": 16, "d": 1, "w": 3},
        {"b": 2, "l": 17, "d": 256, "w": 8},
        {"b": 1, "l": 4099, "d": 33, "w": 5},
        {"b": 2, "l": 4099, "d": 288, "w": 4},
    ),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 4096, "d": 4096, "w": 4}, SILU),
        Benchmark("fp32", {"b": 8, "l": 4096, "d": 4096, "w": 4}, SILU, torch.float32),
        Benchmark("long", {"b": 1, "l": 65536, "d": 2048, "w": 4}, SILU),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "d": 1024, "w": 4}, SILU, graph=True),
    ),
)
