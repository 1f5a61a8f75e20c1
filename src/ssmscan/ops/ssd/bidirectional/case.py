"""What the tests and benchmarks need to know of ssd_bidirectional."""

import torch

from ssmscan.ops.ssd.bidirectional.op import ssd_bidirectional
from ssmscan.ops.ssd.case import CASE as SSD
from ssmscan.ops.ssd.case import LAYER, PLAIN
from ssmscan.testing import Benchmark, OpCase, Option, Refusal

REVERSED = ("dt_rev", "B_rev", "C_rev")


def _inputs(size, generator):
    tensors = SSD.inputs(size, generator)
    other = {
        name: torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64) for name in ("dt", "B", "C")
    }
    return tensors | {f"{name}_rev": tensor for name, tensor in other.items()}


HYDRA = Option(
    "hydra", ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", *REVERSED), {"dt_softplus": True, "shift": True}
)
SHARED = Option("shared", LAYER.tensors, LAYER.keywords)
GATED = Option("shared, z, dt_rev", (*LAYER.tensors, "z", "dt_rev"), LAYER.keywords)
LAYER_OF_HYDRA = Option("separate", (*LAYER.tensors, *REVERSED), {"dt_softplus": True, "shift": True})

HEADLINE = SSD.benchmarks[0].size

CASE = OpCase(
    name="ssd_bidirectional",
    op=ssd_bidirectional,
    inputs=_inputs,
    options=(HYDRA, GATED, PLAIN),
    # With whole chunks both directions share their gradients.
    sizes=(*SSD.sizes, {"b": 2, "l": 48, "h": 4, "p": 5, "g": 2, "n": 7}),
    sequence=("x", "dt", "B", "C", "z", *REVERSED),
    channelwise=SSD.channelwise,
    wide=SSD.wide,
    # In a matrix product with a triangle of zeros a NaN reaches all of its chunk.
    lacks=("causal", "nan"),
    rounds=True,
    heavy=True,
    extremes={name: SSD.extremes[name] for name in ("a huge dt at times", "A = 0", "A strong")},
    refused=(
        Refusal("heads and groups", SSD.refused[0].change, ValueError, "the groups of B"),
        Refusal("dt_rev", lambda call: call.update(dt_rev=call["dt_rev"][:, 1:]), ValueError, "dt_rev"),
        Refusal("B_rev", lambda call: call.update(B_rev=call["B_rev"][..., 1:]), ValueError, "B_rev"),
        Refusal("C_rev", lambda call: call.update(C_rev=call["C_rev"][..., 1:]), ValueError, "C_rev"),
    ),
    large=SSD.large,
    peak_memory=SSD.peak_memory,
    host=Benchmark("host", {"b": 1, "l": 128, "h": 8, "p": 64, "g": 1, "n": 64}, SHARED),
    benchmarks=(
        Benchmark("headline", HEADLINE, SHARED),
        Benchmark("Hydra", HEADLINE, LAYER_OF_HYDRA),
    ),
)
