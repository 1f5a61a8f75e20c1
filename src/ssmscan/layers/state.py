"""States of layers: how a layer reads one and overwrites it, and what callers do with one.

A state is a tensor, or a tuple (named or not) of states. Its first axis has a row for each sequence. Its tensors keep
their addresses, so that a CUDA graph which was captured once goes on.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssmscan.layers.context import Context

State = TypeVar("State")


class Held:
    """A state as a block can be given it where its tensors have a history.

    What wraps a module to shard or cast its arguments looks for tensors in them, and hands on others in their place. It
    does not look in here.
    """

    def __init__(self, state: Any) -> None:
        self.state = state


def advance(
    context: Context,
    operation: Callable[..., tuple[Tensor, Tensor]],
    step: Callable[..., Tensor],
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: Mapping[str, Tensor],
    **fixed: Any,
) -> Tensor:
    """Run an operation over ``tokens`` and leave the state after the last of them in ``h``.

    Args:
        context: that of the layer.
        operation: a sequence operation of :mod:`ssmscan.ops`.
        step: its decode step, which one token without a derivative takes.
        h: the state before the first token, overwritten without a gradient unless it was computed with one; None is
            zeros, and nothing is kept.
        cu_seqlens: bounds of packed sequences, or None.
        tokens: the operation's arguments with a time axis, (b, l, ...), by name; "x" is among them.
        fixed: its other arguments.

    Returns:
        y, (b, l, ...).
    """
    if h is None:
        return context.run(operation, **tokens, **fixed, cu_seqlens=cu_seqlens)[0]
    grad = torch.is_grad_enabled()
    if tokens["x"].shape[1] == 1 and cu_seqlens is None and not grad and not context.split:
        return step(**tokens, **fixed, h=h)
    # The derivative needs the state that was read.
    y, after = context.run(operation, **tokens, **fixed, h0=h.clone() if grad else h, cu_seqlens=cu_seqlens)
    overwrite(h, after)
    return y


def overwrite(h: Tensor, after: Tensor) -> None:
    """Leave the state ``after`` in ``h``: without its gradient, but where ``h`` was computed with one."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and h.requires_grad and not h.is_leaf):
        h.copy_(after)


def write(memory: Tensor, index: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """Put ``values`` at ``index`` of a state, and return the state: with the values' gradient, where there is one."""
    values = values.to(memory.dtype)
    if not torch.is_grad_enabled():
        return memory.index_put_(index, values)
    after = memory.index_put(index, values)
    overwrite(memory, after)
    return after


def recomputing() -> bool:
    """Whether this runs within a backward: a forward there is one that activation checkpointing runs again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def tensors(state: Any) -> Iterator[Tensor]:
    """All tensors of a state."""
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state:
            yield from tensors(part)


def copy(state: State) -> State:
    """A copy of a state, in memory of its own: what :func:`restore` goes back to.

    Args:
        state: what a layer's ``init_state`` made, or a tuple of such.

    Returns:
        The same structure with copied tensors.

    Example:
        >>> import torch
        >>> from ssmscan import layers
        >>> layer = layers.GatedSSM(4)
        >>> state = layer.init_state(1)
        >>> saved = layers.copy(state)
        >>> _ = layer(torch.randn(1, 3, 4), state)
        >>> layers.restore(state, saved)
        >>> state.scan.abs().sum().item()
        0.0
    """
    if isinstance(state, Tensor):
        return state.detach().clone()  # type: ignore[return-value]
    parts = [copy(part) for part in state]  # type: ignore[attr-defined]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)  # type: ignore[call-arg]


@torch.no_grad()
def restore(state: State, saved: State) -> None:
    """Overwrite a state in place with a copy that was saved from it.

    Args:
        state: overwritten.
        saved: what :func:`copy` returned for it.
    """
    for tensor, value in zip(tensors(state), tensors(saved), strict=True):
        tensor.copy_(value)


@torch.no_grad()
def reorder(state: State, index: Tensor) -> None:
    """Make row i of a state what row ``index[i]`` was, in place: beams that go on from others.

    Args:
        state: overwritten.
        index: a row for each row, (b,), int64 or int32.

    Example:
        >>> import torch
        >>> from ssmscan import layers
        >>> state = layers.GatedSSM(1, expand=1).init_state(3)
        >>> _ = state.scan.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> layers.reorder(state, torch.tensor([2, 0, 0]))
        >>> state.scan.flatten().tolist()
        [3.0, 1.0, 1.0]
    """
    for tensor in tensors(state):
        tensor.copy_(tensor.index_select(0, index))
