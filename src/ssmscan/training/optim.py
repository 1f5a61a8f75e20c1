"""The optimizer's parameter groups and the learning rate of a step."""

import math

import torch
from torch import nn

from ssmscan.training.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two groups: matrices decay; biases, norms, embeddings and marked parameters do not.

    A parameter does not decay when it has fewer than two axes, belongs to an embedding (a rare token would fade between
    two occurrences), or has ``_no_weight_decay = True``, as decay biases have.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for p in model.parameters():
        keeps = p.dim() < 2 or id(p) in embeddings or getattr(p, "_no_weight_decay", False)
        (kept if keeps else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of ``step`` in 0 … steps-1: linear warmup to the peak, then a cosine down to ``min_lr``.

    A function of the step alone, so a resumed run needs no schedule restored.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
