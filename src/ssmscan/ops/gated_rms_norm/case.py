"""What the tests and benchmarks need to know of gated_rms_norm."""

import torch

from ssmscan.ops.gated_rms_norm.op import gated_rms_norm
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

GATED = Option("gate before", ("x", "weight", "z"))
AFTER = Option("gate after, groups", ("x", "weight", "z"), {"norm_before_gate": True, "group_size": 3})
GROUPS = Option("gate before, groups", ("x", "weight", "z"), {"group_size": 3})
BARE = Option("no gate", ("x", "weight"))


def _inputs(size, generator):
    shape = (size["b"], size["l"], size["d"])
    return {
        "x": torch.randn(shape, generator=generator, dtype=torch.float64),
        "weight": torch.randn(size["d"], generator=generator, dtype=torch.float64),
        "z": torch.randn(shape, generator=generator, dtype=torch.float64),
    }


def _rows(scale):
    """Every third row of another scale, the others as they are."""

    def inputs(size, generator):
        x = _inputs(size, generator)["x"]
        x[:, ::3] *= scale
        return {"x": x}

    return inputs


def _saturated(size, generator):
    return {"z": 100 * _inputs(size, generator)["z"]}


CASE = OpCase(
    name="gated_rms_norm",
    leading=True,
    op=gated_rms_norm,
    inputs=_inputs,
    options=(GATED, AFTER, GROUPS, BARE),
    sizes=({"b": 2, "l": 19, "d": 6}, {"b": 1, "l": 5, "d": 129}, {"b": 3, "l": 1, "d": 3}),
    sequence=("x", "z"),
    # The channels of a group share their mean.
    channelwise=(),
    linear=("weight",),
    extremes={
        "zero rows": _rows(0.0),
        "rows of 1e4": _rows(1e4),
        "rows of 1e-20": _rows(1e-20),
        "gate saturated": _saturated,
    },
    refused=(
        Refusal("eps 0", lambda call: call.update(eps=0.0), ValueError, "eps"),
        Refusal("eps in text", lambda call: call.update(eps="1e-5"), TypeError, "eps must be a number"),
        Refusal("group_size", lambda call: call.update(group_size=4), ValueError, "group_size"),
        Refusal("group_size 0", lambda call: call.update(group_size=0), ValueError, "group_size"),
        Refusal("group_size 2.5", lambda call: call.update(group_size=2.5), TypeError, "group_size must be an integer"),
        Refusal("group_size True", lambda call: call.update(group_size=True), TypeError, "group_size must be an int"),
        Refusal("dtype of integers", lambda call: call.update(dtype=torch.int32), TypeError, "dtype must be None"),
        Refusal("dtype in text", lambda call: call.update(dtype="float32"), TypeError, "dtype must be None"),
    ),
    large=(
        {"b": 2, "l": 100, "d": 33},
        {"b": 3, "l": 1, "d": 384},
        {"b": 2, "l": 1000, "d": 768},
        {"b": 2, "l": 300, "d": 4098},
        {"b": 1, "l": 3, "d": 12288},
    ),
    benchmarks=(
        Benchmark("headline", {"b": 8, "l": 4096, "d": 4096}, GATED),
        Benchmark("no gate", {"b": 8, "l": 4096, "d": 4096}, BARE),
        Benchmark("fp32", {"b": 8, "l": 4096, "d": 4096}, GATED, torch.float32),
        Benchmark("small, graph replay", {"b": 2, "l": 2048, "d": 1024}, GATED, graph=True),
    ),
)
