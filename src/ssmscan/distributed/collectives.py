"""Collectives of tensor parallelism with their derivatives: what every rank has the same of, and what is shared out."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan.shapes import product_dtype


@torch.compiler.disable
def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, the same on all ranks, for each to make a part of the result from: the gradient is the sum of theirs."""
    return _Copy.apply(x, group)


@torch.compiler.disable
def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, with which all do the same: each summand's gradient is that of the sum.

    It is made in place, so x is nothing that a derivative of what came before reads.
    """
    return _Total.apply(x, group)


@torch.compiler.disable
def join(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of the last axis, side by side, with which all do the same."""
    return _Join.apply(x, group)


@torch.compiler.disable
def spread_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """A linear layer of :func:`copy` of x, which is cast first: its gradient is summed in the dtype of the products.

    In the backward the sum goes between the ranks while the gradient of ``weight`` is made.
    """
    return _SpreadLinear.apply(x, weight, bias, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Not in place, for others may have the same gradient.
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

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


class _SpreadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        dtype = product_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx, dweight, dbias = None, None, None
        if wants_x:
            dx = dy @ weight
            summing = dist.all_reduce(dx, group=ctx.group, async_op=True)
        if wants_weight:
            dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        if wants_bias:
            dbias = dy.flatten(0, -2).sum(0)
        if wants_x:
            summing.wait()
        return dx, dweight, dbias, None
