"""SplitContext: the sequence of a layer, split over the ranks of a group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan.distributed.context import context_parallel, lengths_of
from ssmscan.distributed.handover import gather
from ssmscan.layers.context import Context, Extent

# The collective's name from PyTorch 2.13 on, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SplitContext(Context):
    """What a layer's :class:`Context` is where each rank of ``group`` has a stretch of the sequence, in their order."""

    split = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return context_parallel(operation, *args, group=self.group, **kwargs)

    @torch.compiler.disable
    def extent(self, length: int, device: torch.device) -> Extent:
        return Extent(lengths_of(length, device, self.group), dist.get_rank(self.group))

    @torch.compiler.disable
    def gather(self, extent: Extent, *parts: Tensor) -> tuple[Tensor, ...]:
        return _Gather.apply(extent, self.group, *parts)


class _Gather(torch.autograd.Function):
    """All stretches, one after the other; the gradient of each is the sum of what the ranks make of it."""

    @staticmethod
    def forward(ctx: Any, extent: Extent, group: dist.ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.extent, ctx.group = extent, group
        # A collective takes stretches of one length.
        longest = max(extent.lengths)
        gathered = gather(group, False, *(_lengthened(part, longest) for part in parts))
        return tuple(
            torch.cat([piece[:, :length] for piece, length in zip(whole, extent.lengths, strict=True)], 1)
            for whole in gathered
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        lengths, own = ctx.extent.lengths, ctx.extent.lengths[ctx.extent.rank]
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        rows = [
            torch.stack([_lengthened(piece, max(lengths)) for piece in gradient.split(lengths, 1)])
            for gradient in gradients
        ]
        flat = torch.cat([row.flatten(1) for row in rows], 1).to(wide)
        total = flat.new_empty(flat.shape[1])
        _reduce_scatter(total, flat.view(-1), group=ctx.group)
        pieces = total.split([row[0].numel() for row in rows])
        return (
            None,
            None,
            *(piece.view(row.shape[1:])[:, :own].to(row.dtype) for piece, row in zip(pieces, rows, strict=True)),
        )


def _lengthened(x: Tensor, length: int) -> Tensor:
    """x, (b, l, ...), with zeros up to so many tokens."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, length - x.shape[1]))
