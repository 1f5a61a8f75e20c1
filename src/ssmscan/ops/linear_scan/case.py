"""What the tests and benchmarks need to know of linear_scan."""

import torch

from ssmscan.ops.linear_scan.op import linear_scan, linear_scan_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

ALL = Option("a, b, c", ("x", "a", "b", "c"))
DECAY = Option("a", ("x", "a"))
LOG = Option("log_a, b", ("x", "log_a", "b"))
LOG_ALL = Option("log_a, b, c", ("x", "log_a", "b", "c"))
OUT = Option("a, c", ("x", "a", "c"))


def _inputs(size, generator):
    shape = (size["b"], size["l"], size["d"])
    x, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    # Memories from one step to a few hundred, and some negative decays.
    log_a = -(10 ** (-2.5 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)))
    sign = torch.where(torch.rand(shape, generator=generator) < 0.1, -1.0, 1.0).double()
    return {"x": x, "a": sign * log_a.exp(), "b": b, "c": c, "log_a": log_a}


def _decay(a):
    """Inputs whose decay has one value everywhere."""

    def inputs(size, generator):
        constant = torch.full((size["b"], size["l"], size["d"]), a, dtype=torch.float64)
        return {"a": constant, "log_a": constant.abs().log()}

    return inputs


def _near_one(size, generator):
    log_a = -1e-4 * torch.rand(size["b"], size["l"], size["d"], generator=generator, dtype=torch.float64)
    return {"a": log_a.exp(), "log_a": log_a}


def _some_zero(size, generator):
    kept = torch.rand(size["b"], size["l"], size["d"], generator=generator, dtype=torch.float64) < 0.8
    return {"a": kept * 0.9, "log_a": (kept * 0.9).log()}


CASE = OpCase(
    name="linear_scan",
    op=linear_scan,
    inputs=_inputs,
    options=(ALL, DECAY, LOG, LOG_ALL, OUT),
    sizes=({"b": 2, "l": 19, "d": 5}, {"b": 1, "l": 16, "d": 33}, {"b": 3, "l": 1, "d": 1}),
    sequence=("x", "a", "b", "c", "log_a"),
    channelwise=("x", "a", "b", "c", "log_a"),
    wide=("log_a",),
    state=lambda size: (size["d"],),
    step=linear_scan_step,
    # The logarithm of a decay of zero is -inf.
    extremes={
        "a = 0": _decay(0.0),
        "a = 0 at times": _some_zero,
        "a = 1": _decay(1.0),
        "a < 0": _decay(-0.7),
        "a near 1": _near_one,
        "a > 1": _decay(1.3),
    },
    refused=(
        Refusal("neither a nor log_a", lambda call: call.pop("a"), ValueError, "exactly one of a and log_a"),
        Refusal("a and log_a", lambda call: call.update(log_a=call["a"]), ValueError, "exactly one of a and log_a"),
    ),
    # Around the 16 steps between two saved states, and the channels of a program.
    large=(
        {"b": 2, "l": 100, "d": 33},
        {"b": 3, "l": 1, "d": 64},
        {"b": 1, "l": 15, "d": 130},
        {"b": 2, "l": 16, "d": 1},
        {"b": 2, "l": 17, "d": 64},
        {"b": 1, "l": 4099, "d": 33},
        {"b": 2, "l": 4099, "d": 130},
    ),
    host=Benchmark("host", {"b": 1, "l": 128, "d": 256}, DECAY),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 8192, "d": 2048}, ALL),
        Benchmark("x and a", {"b": 8, "l": 8192, "d": 2048}, DECAY),
        Benchmark("fp32", {"b": 8, "l": 8192, "d": 2048}, ALL, torch.float32),
        Benchmark("long", {"b": 1, "l": 65536, "d": 2048}, ALL),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "d": 1024}, ALL, graph=True),
        Benchmark("two cores", {"b": 2, "l": 4096, "d": 1024}, ALL, torch.float32, device="cpu"),
    ),
)
