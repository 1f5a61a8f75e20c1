"""rg_lru: the real-gated linear recurrent unit of Griffin and Hawk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ssmscan.ops.decoding import check_state, fused, leading_axes
from ssmscan.ops.packing import enter
from ssmscan.ops.rg_lru import autograd, plain, reference
from ssmscan.ops.rg_lru.autograd import Inputs, Options
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def rg_lru(
    x: Float[Tensor, "b l d"],
    input_gate: Float[Tensor, "b l d"],
    recurrence_gate: Float[Tensor, "b l d"],
    a_param: Float[Tensor, " d"],
    *,
    scale_first: bool = True,
    h0: Float[Tensor, "b d"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
    """Run a linear recurrence whose decay and input are gated, and whose states keep the size of the inputs.

    .. math::
        \\log a_t = -8 \\, \\sigma(r_t) \\, \\mathrm{softplus}(\\Lambda), \\qquad
        h_t = a_t h_{t-1} + \\sqrt{1 - a_t^2} \\; \\sigma(i_t) \\, x_t, \\qquad y_t = h_t

    The derivative of the square root in log a, -a²/sqrt(1 - a²), has no limit as a reaches 1; it is bounded by 1000,
    which takes effect where 1 - a is below 5e-7.

    Args:
        x: input, (b, l, d), float32, bfloat16 or float16 (float64 off the Triton backend).
        input_gate: the gate i of the input before its sigmoid, (b, l, d).
        recurrence_gate: the gate r of the recurrence before its sigmoid, (b, l, d).
        a_param: the parameter Λ of each channel, (d,): at an open gate its decay is sigmoid(-Λ)^8. float32 is
            recommended.
        scale_first: whether the first token of each sequence, in scan order, is as any other. False leaves its input
            unscaled, with 1 in place of sqrt(1 - a²), as RecurrentGemma has it. With ``h0`` sequences are continued,
            so that none has its first token here, and False changes nothing.
        h0: initial state, (b, d), or (s, d) with ``cu_seqlens``; None is zero.
        reverse: run from the right end to the left. ``h0`` then enters at the right end, and the returned state is
            the one at the left end.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (b, l, d) in x's dtype, and the final state, (b, d) or (s, d), in float32 (float64 when an input is).

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, device or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    The recurrence is that of De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (2024),
    section 2.4, with c = 8.

    Example:
        >>> import torch
        >>> from ssmscan import rg_lru
        >>> x, gate = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
        >>> y, h = rg_lru(x, gate, gate, torch.tensor([-2.0]))
        >>> [round(v, 3) for v in y.flatten().tolist()]
        [0.399, 0.64, 0.784]
    """
    _check("rg_lru", "b, l, d", x, input_gate, recurrence_gate, a_param, h0)
    check_flags("rg_lru", reverse=reverse, scale_first=scale_first)
    dtype = state_dtype(x, input_gate, recurrence_gate, a_param, h0)
    scale_first = scale_first or h0 is not None
    implementation, sequence, h0 = enter("rg_lru", backend, x, dtype, cu_seqlens, h0, "d", x.shape[2:])
    inputs, options = Inputs(x, input_gate, recurrence_gate, a_param, h0, sequence), Options(reverse, scale_first)
    if implementation == "reference":
        return reference.rg_lru(*inputs, *options)
    if implementation == "torch":
        return plain.rg_lru(inputs, options)
    return autograd.rg_lru(inputs, options, implementation)


def rg_lru_step(
    x: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    input_gate: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    recurrence_gate: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    a_param: Float[Tensor, " d"],
    *,
    h: Float[Tensor, "rows d"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b l d"]:
    """Advance :func:`rg_lru` by one token or several, updating the state in place.

    .. math:: h \\leftarrow a h + \\sqrt{1 - a^2} \\; \\sigma(i) \\, x, \\qquad y = h

    A step continues a sequence, so it scales every token.

    Args:
        x, input_gate, recurrence_gate: as in :func:`rg_lru`, without the length for one token: (b, d). With it, l
            tokens have the results of l steps, to the last bit.
        a_param: as in :func:`rg_lru`, (d,).
        h: the state, (b, d), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`rg_lru`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import rg_lru_step
        >>> h, gate = torch.zeros(1, 1), torch.zeros(1, 1)
        >>> y = rg_lru_step(torch.ones(1, 1), gate, gate, torch.tensor([-2.0]), h=h)
        >>> round(y.item(), 3), round(h.item(), 3)
        (0.399, 0.399)
    """
    leading = leading_axes("rg_lru_step", x, "d")
    _check("rg_lru_step", leading + "d", x, input_gate, recurrence_gate, a_param, h)
    check_state("rg_lru_step", h, "d", x.shape[0], x.shape[-1:], state_indices)
    inputs = (x, input_gate, recurrence_gate, a_param)
    if fused("rg_lru_step", state_dtype(*inputs, h), h, *inputs):
        return autograd.rg_lru_step(*inputs, h, state_indices)
    return plain.rg_lru_step(*inputs, h, state_indices)


def _check(
    function: str,
    axes: str,
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    h: Tensor | None,
) -> None:
    """Refuse what is not a scan."""
    gates = {"input_gate": input_gate, "recurrence_gate": recurrence_gate}
    state = "h" if function.endswith("step") else "h0"
    check_tensors(function, {"x": x, **gates, "a_param": a_param}, **{state: h})
    check_rank(function, "x", x, axes)
    for name, gate in gates.items():
        check_shape(function, name, gate, axes, x.shape, "x")
    check_shape(function, "a_param", a_param, "d", x.shape[-1:], "x")
