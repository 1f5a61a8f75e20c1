"""The optimizer's parameter groups and the learning rate of a step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssmscan.layers import decay_groups
from ssmscan.training.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two groups, :func:`ssmscan.layers.decay_groups`: what is weight-decayed, and what is not."""
    decayed, kept = decay_groups(model)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    on_cuda = decayed[0].is_cuda
    return OwnAdamW(groups, lr=config.lr, betas=config.betas, fused=True, capturable=on_cuda)


class OwnAdamW(torch.optim.AdamW):
    """AdamW of what this process has of each parameter.

    The same update, for which an operation on DTensors, hundreds at once, costs the host ten times as much.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        # AdamW fills the lists with a group's parameters, gradients and moments.
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return has_complex


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of ``step`` in 0 … steps-1: linear warmup to the peak, then a cosine down to ``min_lr``.

    A function of the step alone, so a resumed run needs no schedule restored.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
