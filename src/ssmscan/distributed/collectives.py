"""Collectives of tensor parallelism with their derivatives: what every rank has the same of, and what is shared out."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.compiler.disable
def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, the same on all ranks, for each to make a part of the result from: the gradient is the sum of theirs."""
    return _Copy.apply(x, group)


@torch.compiler.disable
def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, with which all do the same: each summand's gradient is that of the sum."""
    return _Total.apply(x, group)


@torch.compiler.disable
def join(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of the last axis, side by side, with which all do the same."""
    return _Join.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, dist.get_rank(ctx.group) * ctx.width, ctx.width), None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
