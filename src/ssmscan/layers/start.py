"""Where step sizes and decays start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmscan.shapes import error


@torch.no_grad()
def draw_step_bias_(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Set ``bias`` so that its softplus is drawn log-uniformly from dt_min to dt_max, and the floor at least."""
    dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_init_floor)
    # The inverse of softplus, dt + log(1 - exp(-dt)).
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def check_steps(name: str, dt_min: float, dt_max: float, dt_init_floor: float = 1e-4) -> None:
    """Refuse step sizes to start from that are not an interval of positive numbers."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(error(name, "dt_min and dt_max must be positive and in order", f"{dt_min} and {dt_max}"))
    if not dt_init_floor > 0:
        raise ValueError(error(name, "dt_init_floor must be positive", dt_init_floor))


@torch.no_grad()
def spread_decay_bias_(bias: Tensor, memory: tuple[float, float]) -> Tensor:
    """Set ``bias``, (..., d), so that the decay σ(bias) remembers for τ tokens, evenly spread in log τ along d.

    A channel that decays by a = exp(-1/τ) has the bias logit(a) = -log(expm1(1/τ)).

    Returns:
        1/τ = -log a, in the shape of ``bias``.
    """
    shortest, longest = (math.log(tau) for tau in memory)
    place = (torch.ones_like(bias).cumsum(-1) - 1) / max(bias.shape[-1] - 1, 1)
    rate = torch.exp(-(shortest + (longest - shortest) * place))
    bias.copy_(-torch.expm1(rate).log())
    return rate


def check_memory(name: str, memory: tuple[float, float]) -> None:
    """Refuse a memory that is not an interval of positive times."""
    if not 0 < memory[0] <= memory[1]:
        raise ValueError(error(name, "memory must be a positive, non-decreasing pair", memory))
