"""The registered operators of causal_conv1d: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step
from ssmscan.shapes import state_dtype


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None
    sequence: Tensor | None
    bounds: Tensor | None


class Options(NamedTuple):
    silu: bool
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, weight, bounds = inputs.x, inputs.weight, inputs.bounds
    batch, l, d = x.shape
    s = batch if bounds is None else bounds.shape[0] - 1
    return x.new_empty(batch, l, d), x.new_empty(s, weight.shape[1] - 1, d, dtype=state_dtype(*inputs[:4]))


causal_conv1d = Operator("causal_conv1d", Inputs, Options, _outputs, constants=2)
causal_conv1d_step = define_step(
    "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) h, Tensor? state_indices, bool silu) "
    "-> Tensor",
    __package__,
)
