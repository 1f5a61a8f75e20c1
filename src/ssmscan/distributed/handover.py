"""What ranks hand over to each other: small tensors of all, in the order of the scan, in one collective."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The collective's name from PyTorch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def with_backward_of(y: Tensor, other: Tensor) -> Tensor:
    """``y``, whose backward runs that of ``other`` with zeros, for no rank may leave a collective out."""
    return _Along.apply(y, other)


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.zeros_like(ctx.saved_tensors[0])


def place(group: dist.ProcessGroup, reverse: bool) -> int:
    """This rank's place in the order of the scan."""
    rank = dist.get_rank(group)
    return dist.get_world_size(group) - 1 - rank if reverse else rank


def gather(group: dist.ProcessGroup, reverse: bool, *parts: Tensor) -> list[Tensor]:
    """Each part of all ranks, (ranks, ...), in scan order: one collective for all parts."""
    reals = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    rows = exchange(torch.cat([real.flatten() for real in reals]), group)()
    rows = rows.flip(0) if reverse else rows
    pieces = rows.split([real.numel() for real in reals], 1)
    gathered = [piece.reshape(len(rows), *real.shape) for piece, real in zip(pieces, reals, strict=True)]
    return [
        torch.view_as_complex(piece) if part.is_complex() else piece
        for piece, part in zip(gathered, parts, strict=True)
    ]


def exchange(row: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send a row of numbers to all ranks; what is returned waits for the rows of all, in the ranks' order."""
    rows = row.new_empty(dist.get_world_size(group), row.numel())
    work = _all_gather(rows.view(-1), row, group, async_op=True)

    def wait() -> Tensor:
        # On a GPU the stream waits, not the host.
        work.wait()
        return rows

    return wait
