"""A scan over a sequence that is split over ranks, each of which scans its stretch once.

The states that enter are made from what each stretch does to a state, h -> P·h + s, and the gradients of the states
that leave from what it does to one of these, dh -> P*·dh + g. Both go before the scan, and before its backward. Triton
kernels make them on the way (``fused.py``).
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssmscan import selective_scan, ssd
from ssmscan.distributed.handover import gather, place, with_backward_of
from ssmscan.ops.registration import Operator
from ssmscan.ops.selective_scan import autograd as selective_scan_autograd
from ssmscan.ops.selective_scan import op as selective_scan_op
from ssmscan.ops.selective_scan.summary import summary as selective_scan_summary
from ssmscan.ops.ssd import autograd as ssd_autograd
from ssmscan.ops.ssd import op as ssd_op
from ssmscan.ops.ssd.summary import summary as ssd_summary


class Summarised:
    """An operation that tells what a stretch does to a state without the outputs, if it is not packed."""

    def __init__(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        prepare: Callable[..., tuple[str, Any, Any]],
        operator: Operator,
        summary: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        self._signature, self._prepare = signature(op), prepare
        self.operator, self.summary = operator, summary

    def prepare(self, **given: Any) -> tuple[str, Any, Any]:
        """The backend that runs, and what its functions take: the operation's own checks of its arguments."""
        bound = self._signature.bind(**given)
        bound.apply_defaults()
        return self._prepare(*bound.args, **bound.kwargs)


SUMMARISED: dict[Any, Summarised] = {
    selective_scan: Summarised(
        selective_scan, selective_scan_op.prepare, selective_scan_autograd.selective_scan, selective_scan_summary
    ),
    ssd: Summarised(ssd, ssd_op.prepare, ssd_autograd.ssd, ssd_summary),
}


class Stretch(NamedTuple):
    """This rank's part of a scan: the operation with its arguments, but for the initial state."""

    op: Callable[..., tuple[Tensor, Tensor]]
    given: dict[str, Any]
    group: dist.ProcessGroup
    reverse: bool

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        return self.op(**(self.given | changes))

    @property
    def summarised(self) -> Summarised | None:
        return SUMMARISED.get(self.op) if self.given.get("cu_seqlens") is None else None


def scan(stretch: Stretch, first: bool, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    """y of this rank's stretch, and the state after the last one's. The scan begins at the ``first`` rank, from h0."""
    summarised = stretch.summarised
    if summarised is not None:
        backend, inputs, options = summarised.prepare(**stretch.given, h0=h0)
        if backend == "triton":
            from ssmscan.distributed.fused import Ranks, fused_scan

            return fused_scan(summarised.operator, inputs, options, Ranks.of(stretch.group, stretch.reverse, first))
    tensors = {name: value for name, value in stretch.given.items() if isinstance(value, Tensor)}
    known = h0 if first else None
    y = h = None
    if summarised is not None:
        with torch.no_grad():
            decay, s = summarised.summary(inputs, options)
            s = s if known is None else _after(decay, known, s)
    elif first:
        # Nothing is waited for, so the scan itself tells.
        y, h = stretch.run(h0=known)
        decay, s = torch.ones_like(h), h.detach()
    else:
        with torch.no_grad():
            _, s = stretch.run(h0=None)
            silent = {name: None for name in ("D", "z") if name in tensors}
            _, decay = stretch.run(x=torch.zeros_like(tensors["x"]), h0=torch.ones_like(s), **silent)
    decays, made = gather(stretch.group, stretch.reverse, decay, s)
    states = [made[0]]
    for decay, s in zip(decays[1:], made[1:], strict=True):
        states.append(_after(decay, states[-1], s))
    if y is None or h is None:
        at = place(stretch.group, stretch.reverse)
        y, h = stretch.run(h0=known if first else states[at - 1])
    if y.shape[1] == 0:
        # Of no tokens an operation may make results without a derivative, and the backward has a collective.
        for tensor in tensors.values():
            if tensor.requires_grad:
                h = with_backward_of(h, tensor)
    # All ranks are given h0, for where it asks for a gradient all have to be there in the backward.
    return _Meet.apply(stretch, first, decays, states[-1], y, h, h0, *tensors.values())


def _after(decay: Tensor, before: Tensor, s: Tensor) -> Tensor:
    """decay·before + s, where the decay of a stretch that grows may overflow: of a state of zero it is s."""
    return torch.where(before == 0, s, decay * before + s)


class _Meet(torch.autograd.Function):
    """y, and the state after the whole sequence in place of that after this stretch."""

    @staticmethod
    def forward(
        ctx: Any,
        stretch: Stretch,
        first: bool,
        decays: Tensor,
        leaving: Tensor,
        y: Tensor,
        h: Tensor,
        h0: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.names = [name for name, value in stretch.given.items() if isinstance(value, Tensor)]
        options = {name: value for name, value in stretch.given.items() if name not in ctx.names}
        ctx.stretch, ctx.first = stretch._replace(given=options), first
        ctx.save_for_backward(decays, *tensors)
        return y.view_as(y), leaving.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dleaving: Tensor) -> tuple[Tensor | None, ...]:
        decays, *tensors = ctx.saved_tensors
        given = {name: tensor.detach() for name, tensor in zip(ctx.names, tensors, strict=True)}
        stretch = ctx.stretch._replace(given=ctx.stretch.given | given)
        # Nothing is asked of the first rank, and of no tokens there is nothing.
        g = torch.zeros_like(dleaving)
        if not ctx.first and dy.shape[1] > 0:
            g = _adjoint(stretch, dy, g)
        gs, dleavings = gather(stretch.group, stretch.reverse, g, dleaving)
        # Each rank's own copy of the last state has a gradient.
        gradients = [dleavings.sum(0)]
        for decay, g in zip(decays.flip(0), gs.flip(0), strict=True):
            gradients.append(_after(decay.conj(), gradients[-1], g))
        dh = gradients[dist.get_world_size(stretch.group) - 1 - place(stretch.group, stretch.reverse)]
        return *(None,) * 4, dy, dh, None, *(None for _ in tensors)


def _adjoint(stretch: Stretch, dy: Tensor, none: Tensor) -> Tensor:
    """The gradient that y's makes of the state which enters; ``none`` is a state of zeros."""
    if (summarised := stretch.summarised) is not None:
        _, inputs, options = summarised.prepare(**stretch.given)
        return summarised.summary(inputs, options, dy)[1]
    with torch.enable_grad():
        h0 = none.requires_grad_()
        y, _ = stretch.run(h0=h0)
    (dh,) = torch.autograd.grad(y, h0, dy)
    return dh
