"""The registered operators of linear_scan: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 16


class Inputs(NamedTuple):
    x: Tensor
    decay: Tensor
    b: Tensor | None
    c: Tensor | None
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    log: bool  # whether the decay is a logarithm
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    batch, l, d = inputs.x.shape
    s = batch if inputs.h0 is None else inputs.h0.shape[0]
    return inputs.x.new_empty(batch, l, d), inputs.x.new_empty(s, d, dtype=state_dtype(*inputs[:5]))


def _saved(inputs: Inputs, options: Options, h: Tensor) -> Tensor:
    batch, l, d = inputs.x.shape
    return h.new_empty(batch, (l + SPAN - 1) // SPAN, d)


linear_scan = Operator("linear_scan", Inputs, Options, _outputs, _saved, constants=1)
linear_scan_step = define_step(
    "linear_scan_step(Tensor x, Tensor decay, Tensor? b, Tensor? c, Tensor(a!) h, Tensor? state_indices, bool log) "
    "-> Tensor",
    __package__,
)
