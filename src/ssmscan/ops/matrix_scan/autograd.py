"""The registered operators of matrix_scan: what it takes; what it returns has the shapes of x."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step, like_x, states_every

# Steps between two of the states that the forward saves for the backward.
SPAN = 16


class Inputs(NamedTuple):
    x: Tensor
    log_a: Tensor
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    reverse: bool


matrix_scan = Operator("matrix_scan", Inputs, Options, like_x, states_every(SPAN), constants=1)
matrix_scan_step = define_step(
    "matrix_scan_step(Tensor x, Tensor log_a, Tensor(a!) h, Tensor? state_indices) -> Tensor", __package__
)
