"""The registered operators of ssd_bidirectional: what it takes, and the shape of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator


class Inputs(NamedTuple):
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_rev: Tensor | None  # None is dt, and so below
    B_rev: Tensor | None
    C_rev: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None  # zeros, or NaN for bad bounds
    sequence: Tensor | None


class Options(NamedTuple):
    softplus: bool
    low: float  # the least and the largest step size
    high: float
    shift: bool


def _outputs(inputs: Inputs, options: Options) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape)


ssd_bidirectional = Operator("ssd_bidirectional", Inputs, Options, _outputs, constants=2, state=False)
