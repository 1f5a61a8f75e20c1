"""The registered operators of linear_scan: what it takes; what it returns has the shapes of x."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step, like_x, states_every

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


linear_scan = Operator("linear_scan", Inputs, Options, like_x, states_every(SPAN), constants=1)
linear_scan_step = define_step(
    "linear_scan_step(Tensor x, Tensor decay, Tensor? b, Tensor? c, Tensor(a!) h, Tensor? state_indices, bool log) "
    "-> Tensor",
    __package__,
)
