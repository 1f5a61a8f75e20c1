"""What the decode steps share: their two forms, the checks of their state, and how they run.

A step takes one token, (b, ...), or the tokens of a short sequence, (b, l, ...), which have the results of l steps, to
the last bit. The state is rounded to its own dtype after each of them.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.registration import needs_grad, observed, transformed
from ssmscan.shapes import INDEX, check_dense, check_shape, error

# The output of one token, and the state after it, from the inputs of the token and the state before it.
Token = Callable[..., tuple[Tensor, Tensor]]


def leading_axes(function: str, x: Tensor, axes: str) -> str:
    """The axes of x before those named: "b, " of one token, "b, l, " of several. What is no tensor is refused later."""
    one = axes.count(",") + 2
    if not isinstance(x, Tensor) or x.dim() == one:
        return "b, "
    if x.dim() != one + 1:
        raise ValueError(error(function, f"x must have shape (b, {axes}) or (b, l, {axes})", tuple(x.shape)))
    return "b, l, "


def check_state(
    function: str, h: Tensor, axes: str, b: int, shape: Sequence[int], state_indices: Tensor | None
) -> None:
    """``h`` has a state of ``shape``, whose axes are named, for each of b batch rows.

    With ``state_indices`` it has any number of them, and the indices are rows of it, or -1. On a GPU their values are
    not read here, for that would stall the stream: what is no row of ``h`` is as -1 then.
    """
    check_dense(function, "h", h)
    if state_indices is None:
        check_shape(function, "h", h, f"b, {axes}", (b, *shape), "x")
        return
    check_dense(function, "state_indices", state_indices)
    if state_indices.dtype not in INDEX:
        raise TypeError(error(function, "state_indices must be int32 or int64", state_indices.dtype, "Convert it."))
    check_shape(function, "state_indices", state_indices, "b", (b,), "x")
    if state_indices.device != h.device:
        rule = f"state_indices must be on the device of h, {h.device}"
        raise ValueError(error(function, rule, state_indices.device, "Move it there."))
    check_shape(function, "h", h, f"rows, {axes}", (*h.shape[:1], *shape), "x")
    if h.is_cpu and not observed((h, state_indices)):
        rows = h.shape[0]
        for index in state_indices.tolist():
            if not -1 <= index < rows:
                rule = f"state_indices must be rows of h, below {rows}, or -1 to skip a batch row"
                raise ValueError(error(function, rule, index))


def fused(function: str, dtype: torch.dtype, h: Tensor, *inputs: Tensor | None) -> bool:
    """Whether ``function`` advances the state ``h`` by its Triton kernel; ``inputs`` are the tensors that it reads.

    On a GPU, not where the arithmetic is to be in the ``dtype`` float64, nor where a derivative is asked for. Of an
    expanded state several elements are one number in memory, which PyTorch refuses to update.
    """
    on_gpu = choose(function, "auto", h.device.type, dtype) == "triton"
    return on_gpu and not needs_grad(h, *inputs) and 0 not in h.stride()


def compiled(function: str, dtype: torch.dtype, h: Tensor, *inputs: Tensor | None) -> bool:
    """Whether ``function`` computes a token by its Numba kernel, rather than in PyTorch.

    On the CPU, where nothing observes the call, and again not in float64, nor where a derivative is asked for.
    """
    if choose(function, "auto", h.device.type, dtype) != "cpu" or dtype is torch.float64:
        return False
    return not (transformed() or needs_grad(h, *inputs) or observed((h, *inputs)))


def advance(
    token: Token,
    inputs: Sequence[Tensor | None],
    h: Tensor,
    state_indices: Tensor | None,
    several: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Advance the state ``h`` token by token, with arithmetic in ``dtype``, and return y.

    ``inputs`` are what ``token`` reads of each token, x first: (b, l, ...) of ``several`` tokens, (b, ...) of one. It
    may overwrite the state that it is given.
    """
    x = inputs[0]
    assert x is not None
    if several and x.shape[1] == 1:
        one = [t if t is None else t.squeeze(1) for t in inputs]
        return advance(token, one, h, state_indices, False, dtype).unsqueeze(1)
    if state_indices is None:
        # A derivative may need the state before.
        before = h.clone() if torch.is_grad_enabled() else h
        y, after = _run(token, inputs, before, several, dtype)
        if after is not h:
            h.copy_(after)
        return y
    if 0 in (h.shape[0], x.shape[0]):
        return torch.zeros_like(x)
    batch_row = torch.arange(x.shape[0], device=h.device)
    taken = (state_indices >= 0) & (state_indices < h.shape[0])
    rows = state_indices.long().clamp(0, h.shape[0] - 1)
    before = h[rows]
    y, after = _run(token, inputs, before.clone(), several, dtype)
    after = torch.where(_beside(taken, after), after, before)
    # How many batch rows are skipped is unknown on the host, so these write too: what the first of the others does, or
    # if there is none, what is there.
    writer = torch.where(taken, batch_row, taken.int().argmax())
    written = torch.where(_beside(writer == batch_row, after), after, after.detach()[writer])
    h.index_copy_(0, rows[writer], written)
    return torch.where(_beside(taken, y), y, 0)


def _run(
    token: Token, inputs: Sequence[Tensor | None], state: Tensor, several: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y of one or several tokens, and the state after them, in the dtype of the one before."""
    if not several:
        # PyTorch computes in vectors what lies in a row, and rounds differently there.
        y, after = token(*(t if t is None else t.contiguous() for t in inputs), state.to(dtype).contiguous())
        return y, after.to(state.dtype)
    ys = []
    for columns in zip(*(repeat(None) if t is None else t.unbind(1) for t in inputs), strict=False):
        y, state = _run(token, columns, state, False, dtype)
        ys.append(y)
    x = inputs[0]
    assert x is not None
    return torch.stack(ys, 1) if ys else torch.zeros_like(x), state


def _beside(flags: Tensor, t: Tensor) -> Tensor:
    """One flag for all of a batch row of t."""
    return flags.view(-1, *(1,) * (t.dim() - 1))
