"""What the tests and benchmarks need to know of matrix_scan."""

import torch

from ssmscan.ops.matrix_scan.op import matrix_scan, matrix_scan_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

LOG = Option("log_a", ("x", "log_a"))
# A piece of a cumulative sum does not start from 0, one token of it says nothing, and from the right it is another sum.
CUMSUM = Option("cumsum_log_a", ("x", "cumsum_log_a"), lacks=("split", "step", "reverse"))


def _inputs(size, generator):
    shape = (size["b"], size["l"], size["r"])
    x = torch.randn(*shape, size["c"], generator=generator, dtype=torch.float64)
    # Memories from one step to a few hundred.
    log_a = -(10 ** (-2.5 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)))
    return {"x": x, "log_a": log_a, "cumsum_log_a": log_a.cumsum(1)}


def _decay(log_a):
    """Inputs whose decay has one value everywhere."""

    def inputs(size, generator):
        constant = torch.full((size["b"], size["l"], size["r"]), log_a, dtype=torch.float64)
        return {"log_a": constant, "cumsum_log_a": constant.cumsum(1)}

    return inputs


def _some_zero(size, generator):
    kept = torch.rand(size["b"], size["l"], size["r"], generator=generator, dtype=torch.float64) < 0.8
    return {"log_a": (kept * 0.9).log()}


CASE = OpCase(
    name="matrix_scan",
    op=matrix_scan,
    inputs=_inputs,
    options=(LOG, CUMSUM),
    # The last has more columns than a program, and a single row.
    sizes=(
        {"b": 2, "l": 19, "r": 2, "c": 3},
        {"b": 1, "l": 16, "r": 1, "c": 33},
        {"b": 3, "l": 1, "r": 1, "c": 1},
        {"b": 1, "l": 17, "r": 1, "c": 70},
    ),
    sequence=("x", "log_a", "cumsum_log_a"),
    channelwise=("x", "log_a", "cumsum_log_a"),
    wide=("log_a", "cumsum_log_a"),
    state=lambda size: (size["r"], size["c"]),
    step=matrix_scan_step,
    # The logarithm of a decay of zero is -inf, of which there is no cumulative sum.
    extremes={
        "a = 0": lambda size, generator: {"log_a": _decay(-torch.inf)(size, generator)["log_a"]},
        "a = 0 at times": _some_zero,
        "a = 1": _decay(0.0),
        "a near 1": _decay(-1e-6),
        "a near 0": _decay(-30.0),
        "a > 1": _decay(0.25),
    },
    refused=(
        Refusal("no decay", lambda call: call.pop("log_a"), ValueError, "exactly one of log_a and cumsum_log_a"),
        Refusal(
            "two decays",
            lambda call: call.update(cumsum_log_a=call["log_a"]),
            ValueError,
            "exactly one of log_a and cumsum_log_a",
        ),
    ),
    # Around the 16 steps between two saved states, and the columns of a program.
    large=(
        {"b": 2, "l": 100, "r": 3, "c": 33},
        {"b": 3, "l": 1, "r": 2, "c": 64},
        {"b": 1, "l": 15, "r": 5, "c": 130},
        {"b": 2, "l": 16, "r": 1, "c": 1},
        {"b": 2, "l": 17, "r": 64, "c": 64},
        {"b": 1, "l": 4099, "r": 3, "c": 20},
        {"b": 2, "l": 4099, "r": 7, "c": 64},
    ),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 4096, "r": 64, "c": 64}, LOG),
        Benchmark("small fp32", {"b": 2, "l": 1024, "r": 64, "c": 64}, LOG, torch.float32),
        Benchmark("small fp32, graph replay", {"b": 2, "l": 1024, "r": 64, "c": 64}, LOG, torch.float32, graph=True),
        Benchmark("two cores", {"b": 1, "l": 2048, "r": 64, "c": 64}, LOG, torch.float32, device="cpu"),
    ),
)
