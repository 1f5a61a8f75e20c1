"""From what each rank knows of its stretch of a sequence to the state that enters it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The collective's name from PyTorch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# From what all ranks sent, (ranks, ...) each, in scan order, to the states that enter them and the one that leaves the
# last: (ranks + 1, ...).
Compose = Callable[..., Tensor]


def handover(compose: Compose, group: dist.ProcessGroup, reverse: bool, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """The state that enters this rank, and the one that leaves the last, with their gradients.

    ``parts`` are what this rank sends. Every rank gathers those of all, once forward and once backward, and composes
    the same states from them in the same order, so all know the same bits. The scan goes through the ranks from the
    last to the first where it is ``reverse``.
    """
    return _Handover.apply(compose, group, reverse, *parts)


class _Handover(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compose: Compose, group: dist.ProcessGroup, reverse: bool, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.compose, ctx.group, ctx.reverse = compose, group, reverse
        gathered = gather(group, reverse, *parts)
        ctx.save_for_backward(*gathered)
        states = compose(*gathered)
        return states[place(group, reverse)].clone(), states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, entering: Tensor, leaving: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank's gradients of all states, of which the last is each rank's own copy.
        enterings, leavings = gather(ctx.group, ctx.reverse, entering, leaving)
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
            states = ctx.compose(*parts)
        gradient = torch.cat([enterings, leavings.sum(0, keepdim=True)])
        gradients = torch.autograd.grad(states, parts, gradient, allow_unused=True, materialize_grads=True)
        own = place(ctx.group, ctx.reverse)
        return None, None, None, *(gradient[own] for gradient in gradients)


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
    gathered = [piece.reshape(-1, *real.shape) for piece, real in zip(pieces, reals, strict=True)]
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
