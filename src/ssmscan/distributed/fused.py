"""A scan over a split sequence by Triton kernels, which walk a stretch little more than a sequence of its own.

Where sequences are few the kernels summarise segments of the length before they walk them. What a whole stretch does to
a state, h -> exp(log)·h + s, and to the gradient of one, dh -> exp(log)·dh + g, is composed from these summaries. All
ranks gather (log, s) in the forward, and in the backward g and the gradients of the final state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssmscan.distributed.handover import exchange, place
from ssmscan.ops._triton.compose import Stretches, compose
from ssmscan.ops.registration import Operator, needs_grad


class Ranks(NamedTuple):
    """Those that scan, and this one among them."""

    group: dist.ProcessGroup
    size: int
    place: int  # in the order of the scan
    reverse: bool
    first: bool  # whether the scan begins here

    @classmethod
    def of(cls, group: dist.ProcessGroup, reverse: bool, first: bool) -> "Ranks":
        return cls(group, dist.get_world_size(group), place(group, reverse), reverse, first)


def fused_scan(operator: Operator, inputs: Any, options: Any, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """y of this rank's stretch, and the state after the last one's. The scan begins from the h0 of the first rank."""
    return _Fused.apply(operator, options, ranks, needs_grad(*inputs), *inputs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, options: Any, ranks: Ranks, save: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # All ranks are given h0, for where it asks for a gradient all have to be there in the backward.
        inputs = operator.inputs._make(tensors)
        if not ranks.first:
            inputs = inputs._replace(h0=None)
        enter = _Entering(ranks, inputs.h0)
        hook = _hook(enter, operator, inputs, options)
        saving = () if operator.saved is None else (save,)
        y, _, *saved = operator.load("triton", "forward")(inputs, options, *saving, **hook)
        ctx.operator, ctx.options, ctx.ranks = operator, options, ranks
        ctx.save_for_backward(*inputs._replace(h0=enter.state), *saved, enter.logs)
        ctx.set_materialize_grads(False)
        return y, enter.leaving

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dleaving: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, options = ctx.operator, ctx.options
        *tensors, logs = ctx.saved_tensors
        inputs = operator.inputs._make(tensors[: operator.count])
        wanted = operator.inputs._make(ctx.needs_input_grad[4:])
        needs = wanted._replace(h0=wanted.h0 and ctx.ranks.first)[: operator.differentiable]
        enter = _Returning(ctx.ranks, logs, dleaving)
        hook = _hook(enter, operator, inputs, options)
        gradients = operator.gradients(tensors, (dy, enter.state), options, needs, "triton", **hook)
        return *(None,) * 4, *gradients, *(None,) * (operator.count - operator.differentiable)


def _hook(enter: "_Entering | _Returning", operator: Operator, inputs: Any, options: Any) -> dict[str, Any]:
    """What has the kernels' launcher ``enter`` a state; a stretch of no tokens has no launch, yet the others wait."""
    if inputs.x.numel() > 0:
        return {"enter": enter}
    h = operator.outputs(inputs, options)[1]
    # A matrix has a rate for each state.
    rates = inputs.A if inputs.A.dim() == 2 else None
    enter(Stretches(h.new_empty(0, *h.shape[:2]), h.new_empty(0, *h.shape), rates))()
    return {}


class _Entering:
    """Makes the ``state`` that enters this rank, the one ``leaving`` the last, and the ``logs`` of all ranks."""

    leaving: Tensor
    logs: Tensor

    def __init__(self, ranks: Ranks, h0: Tensor | None) -> None:
        self.ranks, self.state = ranks, h0

    def __call__(self, own: Stretches) -> Callable[[], Tensor | None]:
        ranks, channels, states = self.ranks, own.logs.shape[1:], own.totals.shape[1:]
        sizes = [channels.numel(), states.numel()]
        row = own.logs.new_empty(sum(sizes))
        log, s = row.split(sizes)
        initial = None if self.state is None else self.state[None]
        compose(own, initial, s.view(states), len(own.logs), log=log)
        gathered = exchange(row, ranks.group)

        def entering() -> Tensor | None:
            logs, made = gathered().split(sizes, 1)
            # What the backward keeps is not the states of all ranks.
            self.logs = logs.unflatten(1, channels).contiguous()
            self.leaving = row.new_empty(states)
            before = None if ranks.first else row.new_empty(states)
            all_ranks = Stretches(self.logs, made.unflatten(1, states), own.rates)
            compose(all_ranks, None, self.leaving, ranks.size, backward=ranks.reverse, before=before, place=ranks.place)
            # The first rank's own state has h0 in it.
            self.state = self.state if ranks.first else before
            return self.state

        return entering


class _Returning:
    """Makes the gradient of the ``state`` that leaves this rank."""

    def __init__(self, ranks: Ranks, logs: Tensor, dleaving: Tensor | None) -> None:
        self.ranks, self.logs, self.dleaving = ranks, logs, dleaving
        self.state: Tensor | None = None

    def __call__(self, own: Stretches) -> Callable[[], Tensor]:
        ranks, states = self.ranks, own.totals.shape[1:]
        row = own.logs.new_empty(2, *states)
        compose(own, None, row[0], len(own.logs))
        if self.dleaving is None:
            row[1].zero_()
        else:
            row[1].copy_(self.dleaving)
        gathered = exchange(row.view(-1), ranks.group)

        def returning() -> Tensor:
            # Each rank's own copy of the last state has a gradient.
            gs, dleavings = gathered().unflatten(1, row.shape).unbind(1)
            behind = ranks.size - 1 - ranks.place
            self.state = state = row.new_empty(states)
            all_ranks = Stretches(self.logs, gs, own.rates)
            compose(all_ranks, dleavings, state, behind, backward=not ranks.reverse)
            return state

        return returning
