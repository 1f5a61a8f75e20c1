"""The loss of a batch that several processes hold."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmscan.models.loss import Holders


class SeveralHolders(Holders):
    """What a model's :class:`Holders` are where the ranks of ``group`` each hold tokens of the batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self.group)


class _Sum(torch.autograd.Function):
    """The sum over the ranks. Its gradient is for each the gradient of its own summand, whose sum is made elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
