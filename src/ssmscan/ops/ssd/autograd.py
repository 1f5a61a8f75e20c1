"""The registered operators of ssd: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step
from ssmscan.shapes import state_dtype


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
    low: float  # the least and the largest step size
    high: float
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    batch, l, heads, p = inputs.x.shape
    s = batch if inputs.h0 is None else inputs.h0.shape[0]
    h = inputs.x.new_empty(s, heads, p, inputs.B.shape[3], dtype=state_dtype(*inputs[:9]))
    return inputs.x.new_empty(batch, l, heads, p), h


ssd = Operator("ssd", Inputs, Options, _outputs, constants=1)
ssd_step = define_step(
    "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor(a!) h, Tensor? state_indices, bool softplus, float low, float high, bool A_is_log) -> Tensor",
    __package__,
)
