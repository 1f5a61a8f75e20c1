"""SplitContext: the sequence of a layer, split over the ranks of a group."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan.distributed.context import context_parallel, lengths_of
from ssmscan.layers.context import Context


class SplitContext(Context):
    """What a layer's :class:`Context` is where each rank of ``group`` has a stretch of the sequence, in their order."""

    split = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @torch.compiler.disable
    def run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return context_parallel(operation, *args, group=self.group, **kwargs)

    @torch.compiler.disable
    def extent(self, length: int, device: torch.device) -> tuple[int, int]:
        lengths = lengths_of(length, device, self.group)
        return sum(lengths[: dist.get_rank(self.group)]), sum(lengths)

    @torch.compiler.disable
    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, lengths_of(x.shape[1], x.device, self.group), self.group)


class _Gather(torch.autograd.Function):
    """All stretches, one after the other; the gradient of each is the sum of what the ranks make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        # A collective takes stretches of one length.
        own = F.pad(x, (0, 0) * (x.dim() - 2) + (0, max(lengths) - x.shape[1])).contiguous()
        received = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(received, own, group)
        return torch.cat([part[:, :length] for part, length in zip(received, lengths, strict=True)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), memory_format=torch.contiguous_format)
        total = total.clone() if total is gradient else total
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        end = list(accumulate(ctx.lengths))[rank]
        return total[:, end - ctx.lengths[rank] : end].to(gradient.dtype), None, None
