"""What the tests and benchmarks need to know of ssd."""

import torch

from ssmscan.ops.ssd.op import ssd, ssd_step
from ssmscan.testing import Benchmark, OpCase, Option, Refusal


def _inputs(size, generator):
    b, l, h, p, g, n = (size[axis] for axis in "blhpgn")

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": randn(b, l, h, p),
        "dt": randn(b, l, h),
        # Memories from a token to some hundred.
        "A": -(10 ** (1.5 * torch.rand(h, generator=generator, dtype=torch.float64) - 1)),
        "B": randn(b, l, g, n),
        "C": randn(b, l, g, n),
        "D": randn(h),
        "z": randn(b, l, h, p),
        "dt_bias": randn(h) - 2,
    }


def _positive(size, generator):
    shape = (size["b"], size["l"], size["h"])
    return {"dt": 10 ** (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 2.5)}


def _positive_and_elementwise(size, generator):
    D = torch.randn(size["h"], size["p"], generator=generator, dtype=torch.float64)
    return _positive(size, generator) | {"D": D}


ALL = Option("all", ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), {"dt_softplus": True})
PLAIN = Option("plain", ("x", "dt", "A", "B", "C"), inputs=_positive)
LIMITED = Option(
    "D, dt_bias, dt_limit",
    ("x", "dt", "A", "B", "C", "D", "dt_bias"),
    {"dt_softplus": True, "dt_limit": (0.05, 0.4)},
)
# Not among the case's options: without its last axis this D is a good one of the other kind.
ELEMENTWISE = Option("D (h, p)", ("x", "dt", "A", "B", "C", "D"), inputs=_positive_and_elementwise)
LAYER = Option("D, dt_bias", ("x", "dt", "A", "B", "C", "D", "dt_bias"), {"dt_softplus": True})


def _logarithms(size, generator):
    return {"A": torch.randn(size["h"], generator=generator, dtype=torch.float64)}


# Nor this one: the operation is that of -exp(A). The kernel of the step has it in itself.
LOGARITHM = Option("log A", LAYER.tensors, {**LAYER.keywords, "A_is_log": True}, inputs=_logarithms)


def _steps(*values):
    """Inputs whose step sizes, before softplus, are some of these."""

    def inputs(size, generator):
        index = torch.randint(len(values), (size["b"], size["l"], size["h"]), generator=generator)
        return {"dt": torch.tensor(values, dtype=torch.float64)[index], "dt_bias": torch.zeros(size["h"]).double()}

    return inputs


def _rate(A):
    def inputs(size, generator):
        return {"A": torch.full((size["h"],), A, dtype=torch.float64)}

    return inputs


CASE = OpCase(
    name="ssd",
    op=ssd,
    inputs=_inputs,
    options=(ALL, PLAIN, LIMITED),
    sizes=(
        {"b": 2, "l": 19, "h": 4, "p": 3, "g": 2, "n": 5},
        {"b": 1, "l": 70, "h": 2, "p": 18, "g": 1, "n": 20},
        {"b": 2, "l": 1, "h": 3, "p": 7, "g": 1, "n": 1},
    ),
    sequence=("x", "dt", "B", "C", "z"),
    channelwise=("x", "dt", "z"),
    wide=("A", "D", "dt_bias"),
    state=lambda size: (size["h"], size["p"], size["n"]),
    step=ssd_step,
    # In a matrix product with a triangle of zeros a NaN reaches back to the first token of its chunk.
    lacks=("nan",),
    rounds=True,
    heavy=True,
    extremes={
        "dt at both ends of softplus": _steps(-100.0, -17.0, 0.0, 19.9, 20.1),
        "a huge dt at times": _steps(-3.0, -2.0, -1.0, 0.5, 1e4),
        "A = 0": _rate(0.0),
        "A strong": _rate(-1e3),
    },
    refused=(
        Refusal("heads and groups", lambda call: call.update(_three_groups(call)), ValueError, "the groups of B"),
        Refusal("limits", lambda call: call.update(dt_limit=(1.0, 0.5)), ValueError, "dt_limit"),
        Refusal("one limit", lambda call: call.update(dt_limit=(1.0,)), ValueError, "dt_limit"),
        Refusal("limit that is no number", lambda call: call.update(dt_limit=(torch.nan, 1.0)), ValueError, "dt_limit"),
        Refusal("no limits", lambda call: call.update(dt_limit=None), TypeError, "dt_limit"),
        Refusal("limits in text", lambda call: call.update(dt_limit=("0", "1")), TypeError, "dt_limit"),
        Refusal(
            "B without groups",
            lambda call: call.update(B=call["B"][:, :, 0]),
            ValueError,
            "B must have shape (b, l, g, n)",
        ),
        Refusal("D", lambda call: call.update(D=call["D"][:1]), ValueError, "D"),
    ),
    large=(
        {"b": 2, "l": 300, "h": 6, "p": 64, "g": 2, "n": 128},
        # Whole tiles, of which nothing is masked.
        {"b": 2, "l": 256, "h": 4, "p": 64, "g": 1, "n": 128},
        {"b": 1, "l": 63, "h": 3, "p": 16, "g": 3, "n": 16},
        {"b": 2, "l": 64, "h": 2, "p": 40, "g": 1, "n": 100},
        {"b": 1, "l": 65, "h": 2, "p": 128, "g": 1, "n": 256},
        # One token, of many sequences: a single sum may cancel up to any loss of digits.
        {"b": 16, "l": 1, "h": 4, "p": 32, "g": 1, "n": 64},
        {"b": 1, "l": 4099, "h": 4, "p": 64, "g": 1, "n": 64},
    ),
    # The states between chunks, of the forward and of the adjoint, and copies of neither.
    peak_memory=6.0,
    host=Benchmark("host", {"b": 1, "l": 128, "h": 8, "p": 64, "g": 1, "n": 64}, LAYER),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 4096, "h": 64, "p": 64, "g": 1, "n": 128}, LAYER),
        Benchmark("long", {"b": 1, "l": 16384, "h": 64, "p": 64, "g": 1, "n": 128}, LAYER),
        Benchmark("a million tokens", {"b": 1, "l": 1 << 20, "h": 16, "p": 64, "g": 1, "n": 128}, LAYER),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "h": 24, "p": 64, "g": 1, "n": 128}, LAYER, graph=True),
        Benchmark("fp32", {"b": 8, "l": 4096, "h": 64, "p": 64, "g": 1, "n": 128}, LAYER, torch.float32),
        Benchmark(
            "two cores", {"b": 1, "l": 2048, "h": 16, "p": 64, "g": 1, "n": 64}, LAYER, torch.float32, device="cpu"
        ),
    ),
)


def _three_groups(call):
    return {name: call[name][:, :, :1].expand(-1, -1, 3, -1) for name in ("B", "C")}
