"""What the tests and benchmarks need to know of rg_lru."""

import torch

from ssmscan.ops.rg_lru.op import rg_lru, rg_lru_step
from ssmscan.testing import Benchmark, OpCase, Option

ALL = Option("all", ("x", "input_gate", "recurrence_gate", "a_param"))
# The step continues a sequence, so it has no such option.
UNSCALED = Option("first unscaled", ALL.tensors, {"scale_first": False}, lacks=("step",))


def _inputs(size, generator):
    shape = (size["b"], size["l"], size["d"])
    x, i, r = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    # Decays at an open gate from 0.9 to 0.999, as the layer initialises them, and some shorter memories.
    log_a = -(10 ** (-3 + 3 * torch.rand(size["d"], generator=generator, dtype=torch.float64)))
    return {"x": x, "input_gate": i, "recurrence_gate": 2 * r, "a_param": (-log_a / 8).expm1().log()}


def _parameter(value):
    """Inputs whose parameter has one value everywhere."""
    return lambda size, generator: {"a_param": torch.full((size["d"],), value, dtype=torch.float64)}


def _gates(value):
    """Inputs whose gates are open or closed."""

    def inputs(size, generator):
        gate = torch.full((size["b"], size["l"], size["d"]), value, dtype=torch.float64)
        return {"input_gate": gate, "recurrence_gate": gate}

    return inputs


CASE = OpCase(
    name="rg_lru",
    op=rg_lru,
    inputs=_inputs,
    options=(ALL, UNSCALED),
    sizes=({"b": 2, "l": 35, "d": 5}, {"b": 1, "l": 16, "d": 65}, {"b": 3, "l": 1, "d": 1}),
    sequence=("x", "input_gate", "recurrence_gate"),
    channelwise=("x", "input_gate", "recurrence_gate"),
    wide=("a_param",),
    state=lambda size: (size["d"],),
    step=rg_lru_step,
    # On both sides of the bound on the gradient, of the series for 1 - a², and of softplus' straight line.
    extremes={
        "a near 1": _parameter(-14.0),
        "a = 1": _parameter(-20.0),
        "a near 0.999": _parameter(-9.0),
        "a near 0": _parameter(3.0),
        "a = 0": _parameter(30.0),
        "closed gates": _gates(-12.0),
        "open gates": _gates(50.0),
    },
    # Around the 16 steps between two saved states, the 32 of a tile, and the channels of a program.
    large=(
        {"b": 2, "l": 100, "d": 33},
        {"b": 3, "l": 1, "d": 64},
        {"b": 1, "l": 15, "d": 130},
        {"b": 2, "l": 16, "d": 1},
        {"b": 2, "l": 49, "d": 64},
        {"b": 1, "l": 4099, "d": 33},
        {"b": 2, "l": 4099, "d": 130},
    ),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 8192, "d": 2048}, ALL),
        Benchmark("fp32", {"b": 8, "l": 8192, "d": 2048}, ALL, torch.float32),
        Benchmark("long", {"b": 1, "l": 65536, "d": 2048}, ALL),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "d": 1024}, ALL, graph=True),
        Benchmark("two cores", {"b": 2, "l": 4096, "d": 1024}, ALL, torch.float32, device="cpu"),
    ),
)
