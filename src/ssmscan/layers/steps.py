"""Where step sizes start, and the projection that makes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.parameters import WideParameters, wide
from ssmscan.shapes import error


@torch.no_grad()
def draw_step_bias_(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Set ``bias`` so that its softplus is drawn log-uniformly from dt_min to dt_max, and the floor at least."""
    dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_init_floor)
    # The inverse of softplus, dt + log(1 - exp(-dt)).
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def check_steps(name: str, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Refuse step sizes to start from that are not an interval of positive numbers."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(error(name, "dt_min and dt_max must be positive and in order", f"{dt_min} and {dt_max}"))
    if not dt_init_floor > 0:
        raise ValueError(error(name, "dt_init_floor must be positive", dt_init_floor))


class StepProjection(WideParameters, nn.Linear):
    """A linear layer whose bias stays float32, and may be left to what comes next.

    The bias of a step size is near -5 and rounding it, or a sum with it, to bfloat16 costs one part in a hundred of the
    step. So :class:`ssmscan.layers.Mamba` calls the layer without its bias and hands that to the scan, which adds in
    float32. A wrapper around the layer, such as an adapter, knows nothing of this: it gets the sum, in float32.
    """

    _keep_wide = ("bias",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=wide(dtype)))

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        y = F.linear(x, self.weight)
        return y + self.bias if with_bias else y
