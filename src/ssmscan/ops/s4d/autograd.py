"""The registered operators of s4d: what it takes, and the shapes of what it returns."""

from typing import NamedTuple

from torch import Tensor

from ssmscan.ops.registration import Operator, define_step


class Inputs(NamedTuple):
    """The discretised system; B, C, D and h0 are in the state's dtype."""

    x: Tensor
    z: Tensor  # log Ā
    B: Tensor
    C: Tensor
    D: Tensor | None
    h0: Tensor | None
    sequence: Tensor | None


class Options(NamedTuple):
    reverse: bool


def _outputs(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, C, h0 = inputs.x, inputs.C, inputs.h0
    return x.new_empty(x.shape), C.new_empty(x.shape[0] if h0 is None else h0.shape[0], *C.shape)


s4d = Operator("s4d", Inputs, Options, _outputs, constants=1)
s4d_step = define_step(
    "s4d_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor(a!) h, Tensor? state_indices) "
    "-> Tensor",
    __package__,
)
