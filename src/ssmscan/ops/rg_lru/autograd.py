"""The registered operators of rg_lru: what it takes; what it returns has the shapes of x."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step, like_x, states_every

# Steps between two of the states that the forward saves for the backward.
SPAN = 16


class Inputs(NamedTuple):
    x: Tensor
    input_gate: Tensor
    recurrence_gate: Tensor
    a_param: Tensor
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    reverse: bool
    scale_first: bool


rg_lru = Operator("rg_lru", Inputs, Options, like_x, states_every(SPAN), constants=1)
rg_lru_step = define_step(
    "rg_lru_step(Tensor x, Tensor input_gate, Tensor recurrence_gate, Tensor a_param, Tensor(a!) h, "
    "Tensor? state_indices) -> Tensor",
    __package__,
)
