"""The registered operators of selective_scan: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 104


class Inputs(NamedTuple):
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    softplus: bool
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, h0 = inputs.x, inputs.h0
    s = x.shape[0] if h0 is None else h0.shape[0]
    return x.new_empty(x.shape), x.new_empty(s, *inputs.A.shape, dtype=state_dtype(*inputs[:9]))


def _saved(inputs: Inputs, options: Options, h: Tensor) -> Tensor:
    batch, l, d = inputs.x.shape
    return h.new_empty(batch, (l + SPAN - 1) // SPAN, inputs.A.shape[1], d)


selective_scan = Operator("selective_scan", Inputs, Options, _outputs, _saved, constants=1)
selective_scan_step = define_step(
    "selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? "
    "dt_bias, Tensor(a!) h, Tensor? state_indices, bool softplus, bool A_is_log) -> Tensor",
    __package__,
)
