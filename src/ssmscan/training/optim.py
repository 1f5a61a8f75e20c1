"""The optimizer's parameter groups and the learning rate of a step."""

import math

import torch
from torch import nn

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
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True, capturable=on_cuda)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of ``step`` in 0 … steps-1: linear warmup to the peak, then a cosine down to ``min_lr``.

    A function of the step alone, so a resumed run needs no schedule restored.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
