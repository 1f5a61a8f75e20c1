"""What the tests and benchmarks need to know of selective_scan."""

import torch

from ssmscan.ops.selective_scan.op import selective_scan, selective_scan_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

ALL = Option("D, z, bias, softplus", ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), {"dt_softplus": True})
UNGATED = Option("D, bias, softplus", tuple(name for name in ALL.tensors if name != "z"), ALL.keywords)
PLAIN = Option("plain", ("x", "dt", "A", "B", "C"))


def _inputs(size, generator):
    b, l, d, n = size["b"], size["l"], size["d"], size["n"]

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = torch.where(torch.rand(b, l, d, generator=generator) < 0.1, -0.1, 1.0) * normal(b, l, d).abs() * 0.3
    return {
        "x": normal(b, l, d),
        "dt": dt,
        "A": -torch.rand(d, n, generator=generator, dtype=torch.float64).mul(4).exp() / 8,
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d),
        "z": normal(b, l, d),
        "dt_bias": normal(d) * 0.5 - 1,
    }


def _groups(size, generator):
    """Two groups, or one for each of an odd number of channels."""
    g = 2 if size["d"] % 2 == 0 else size["d"]
    shape = (size["b"], size["l"], g, size["n"])
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in "BC"}
    # Without a softplus a step is mostly positive.
    return tensors | {"dt_bias": 0.05 * torch.randn(size["d"], generator=generator, dtype=torch.float64)}


def _steps(*values):
    """Inputs whose steps, before the bias, take ``values`` in turn."""

    def inputs(size, generator):
        shape = (size["b"], size["l"], size["d"])
        turn = torch.arange(shape[1] * shape[2]).view(1, *shape[1:]).expand(shape) % len(values)
        # Without the softplus the negative ones make the states grow, so A is small.
        A = -0.01 * torch.rand(shape[2], size["n"], generator=generator, dtype=torch.float64)
        dt = torch.tensor(values, dtype=torch.float64)[turn]
        return {"dt": dt, "dt_bias": torch.zeros(shape[2], dtype=torch.float64), "A": A}

    return inputs


def _long(size, generator):
    return {"dt": torch.full((size["b"], size["l"], size["d"]), 1e4, dtype=torch.float64)}


def _no_decay(size, generator):
    return {"A": torch.zeros(size["d"], size["n"], dtype=torch.float64)}


GROUPED = Option("grouped, bias", ("x", "dt", "A", "B", "C", "D", "dt_bias"), inputs=_groups)


def _logarithms(size, generator):
    return {"A": torch.randn(size["d"], size["n"], generator=generator, dtype=torch.float64)}


# Not among the case's options: the operation is that of -exp(A). The kernel of the step has it in itself.
LOGARITHM = Option("log A", UNGATED.tensors, {**UNGATED.keywords, "A_is_log": True}, inputs=_logarithms)


def _exponentials(size, direction):
    """A state's decay is one exponential, which the backward takes twice more; an H200 does 3.9e12 in a second."""
    times = {"fwd": 1, "fwdbwd": 3}[direction]
    return times * size["b"] * size["l"] * size["d"] * size["n"] / 3.9e9


CASE = OpCase(
    name="selective_scan",
    op=selective_scan,
    inputs=_inputs,
    options=(ALL, PLAIN, GROUPED),
    sizes=(
        {"b": 2, "l": 19, "d": 6, "n": 3},
        {"b": 1, "l": 9, "d": 33, "n": 16},
        {"b": 1, "l": 5, "d": 3, "n": 40},
        {"b": 3, "l": 1, "d": 1, "n": 1},
    ),
    sequence=("x", "dt", "B", "C", "z"),
    channelwise=("x", "dt", "z"),
    wide=("A", "D", "dt_bias"),
    state=lambda size: (size["d"], size["n"]),
    step=selective_scan_step,
    extremes={
        "softplus of -100 to 100": _steps(-100.0, -17.0, -9.2, 0.0, 19.99, 20.01, 100.0),
        "small steps": _steps(-7.0, -6.0, -8.0),
        "long steps": _long,
        "A = 0": _no_decay,
    },
    refused=(
        Refusal("groups", lambda call: call.update(B=call["B"][:, :, None].expand(-1, -1, 4, -1)), ValueError, "B"),
        Refusal("C of another form", lambda call: call.update(C=call["C"][:, :, None]), ValueError, "C"),
        Refusal(
            "too many states",
            lambda call: call.update(A=call["A"][:, :1].expand(-1, 257)),
            ValueError,
            "A must have 1 to 256 states",
        ),
        Refusal("no states", lambda call: call.update(A=call["A"][:, :0]), ValueError, "A must have 1 to 256 states"),
    ),
    large=(
        {"b": 2, "l": 100, "d": 66, "n": 16},
        {"b": 3, "l": 1, "d": 64, "n": 16},
        {"b": 1, "l": 103, "d": 130, "n": 5},
        {"b": 2, "l": 104, "d": 1, "n": 1},
        {"b": 2, "l": 105, "d": 64, "n": 17},
        {"b": 1, "l": 70, "d": 34, "n": 256},
        {"b": 1, "l": 4099, "d": 34, "n": 16},
        {"b": 2, "l": 4099, "d": 130, "n": 16},
    ),
    # The saved states, the backward's scratch, and the sums of dB and dC over 64 channels each: as much as one input.
    peak_memory=1.332,
    floor_ms=_exponentials,
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 4096, "d": 4096, "n": 16}, UNGATED),
        Benchmark("gated", {"b": 8, "l": 4096, "d": 4096, "n": 16}, ALL),
        Benchmark("long", {"b": 1, "l": 32768, "d": 4096, "n": 16}, UNGATED),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "d": 1536, "n": 16}, UNGATED, graph=True),
        Benchmark("two cores", {"b": 2, "l": 1024, "d": 512, "n": 16}, UNGATED, torch.float32, device="cpu"),
    ),
)
