"""The registered operators of gated_rms_norm: what it takes, and the shape of what it returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssmscan.ops.registration import Operator


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    z: Tensor | None


class Options(NamedTuple):
    eps: float
    size: int  # channels of a group
    norm_before_gate: bool
    dtype: torch.dtype  # of y


def _outputs(inputs: Inputs, options: Options) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape, dtype=options.dtype)


gated_rms_norm = Operator("gated_rms_norm", Inputs, Options, _outputs, state=False)
