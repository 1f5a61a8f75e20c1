"""The halo of a convolution: the last w-1 inputs before a rank, be they of one rank before it or of several."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan.distributed.handover import gather, place
from ssmscan.ops.packing import pack


def last_inputs(
    x: Tensor, kept: int, cu_seqlens: Tensor | None, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The last inputs of each sequence in scan order, (b, kept, d), and how many of them are of x, (b,).

    Before these stand the last of ``h0``, or zeros.
    """
    l, d = x.shape[1:]
    if cu_seqlens is None:
        new = torch.full((x.shape[0],), min(l, kept), device=x.device)
        nearest = x[:, :kept].flip(1) if reverse else x[:, max(l - kept, 0) :]
        if l >= kept:
            return nearest, new
        before = x.new_zeros(x.shape[0], kept, d) if h0 is None else h0
        return torch.cat([before[:, l:], nearest], 1), new
    new = cu_seqlens.diff().clamp(0, kept)
    place = torch.arange(kept, device=x.device)
    token = cu_seqlens[:-1, None] + kept - 1 - place if reverse else cu_seqlens[1:, None] - kept + place
    # A derivative goes through a stretch of no tokens too, for the ranks wait for each other in the backward.
    inputs = x[0] if l > 0 else F.pad(x[0], (0, 0, 0, 1))
    nearest = inputs.index_select(0, token.clamp(0, max(l - 1, 0)).flatten()).view(*token.shape, d)
    before = x.new_zeros(())
    if h0 is not None:
        moved = (place + new.unsqueeze(1)).clamp(max=kept - 1)
        before = h0.gather(1, moved.unsqueeze(2).expand_as(h0))
    last = torch.where((place >= kept - new.unsqueeze(1)).unsqueeze(2), nearest, before)
    # As the outputs, they are NaN for bad bounds.
    _, valid = pack(cu_seqlens, l)
    return torch.where(valid, last, torch.nan), new


def halo(last: Tensor, new: Tensor, group: dist.ProcessGroup, reverse: bool) -> tuple[Tensor, Tensor]:
    """The inputs that enter this rank, and those that leave the last one, with their gradients.

    Args:
        last: the last inputs of this rank, (b, w-1, d), the newest last; on the first rank, after what comes before the
            sequence. On the others only those that are its own count.
        new: how many of them are this rank's own, (b,).
        group, reverse: the ranks, and whether the sequence goes through them from the last to the first.

    Returns:
        both (b, w-1, d). On the first rank nothing enters, and what is returned has no meaning.

    The number of kernels is the same for any number of ranks.
    """
    return _Halo.apply(last, new, group, reverse)


class _Halo(torch.autograd.Function):
    """Inputs are numbered from the first rank's window on; each rank goes on where the one before it ends."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, new: Tensor, group: dist.ProcessGroup, reverse: bool) -> tuple[Tensor, Tensor]:
        b, kept = last.shape[:2]
        at = place(group, reverse)
        windows, counts = gather(group, reverse, last, new.to(last.dtype))
        counts[0].fill_(kept)
        ends = counts.long().cumsum(0)
        wanted = torch.stack([ends[at - 1], ends[-1]]).unsqueeze(2) - torch.arange(kept, 0, -1, device=last.device)
        # An input is with the first rank that does not end before it.
        holder = (ends[:, None, :, None] <= wanted).sum(0)
        row = torch.arange(b, device=last.device).unsqueeze(1)
        entering, leaving = windows[holder, row, wanted - ends[holder, row] + kept]
        ctx.save_for_backward(ends, counts[at])
        ctx.group, ctx.reverse = group, reverse
        return entering.clone(), leaving.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, entering: Tensor, leaving: Tensor) -> tuple[Tensor | None, ...]:
        ends, own = ctx.saved_tensors
        at, kept = place(ctx.group, ctx.reverse), entering.shape[1]
        enterings, leavings = gather(ctx.group, ctx.reverse, entering, leaving)
        # The windows at this rank's end and at those behind, through which its inputs move towards the front. The last
        # is each rank's own copy.
        windows = torch.cat([enterings[at + 1 :], leavings.sum(0, keepdim=True)])
        numbers = torch.arange(kept, device=ends.device)
        moved = (numbers - (ends[at:] - ends[at]).unsqueeze(2)).unsqueeze(3)
        found = windows.gather(2, moved.clamp(min=0).expand_as(windows))
        counted = (moved >= 0) & (numbers >= kept - own.unsqueeze(1)).unsqueeze(2)
        return found.where(counted, 0).sum(0), None, None, None
