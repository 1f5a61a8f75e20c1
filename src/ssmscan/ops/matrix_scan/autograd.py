"""The registered operators of matrix_scan: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 16


class Inputs(NamedTuple):
    x: Tensor
    log_a: Tensor
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    batch, l, r, c = inputs.x.shape
    s = batch if inputs.h0 is None else inputs.h0.shape[0]
    return inputs.x.new_empty(batch, l, r, c), inputs.x.new_empty(s, r, c, dtype=state_dtype(*inputs[:3]))


def _saved(inputs: Inputs, options: Options, h: Tensor) -> Tensor:
    batch, l, r, c = inputs.x.shape
    return h.new_empty(batch, (l + SPAN - 1) // SPAN, r, c)


matrix_scan = Operator("matrix_scan", Inputs, Options, _outputs, _saved, constants=1)
matrix_scan_step = define_step(
    "matrix_scan_step(Tensor x, Tensor log_a, Tensor(a!) h, Tensor? state_indices) -> Tensor", __package__
)
