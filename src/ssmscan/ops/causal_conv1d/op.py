"""causal_conv1d: a short depthwise convolution over the past, with an optional SiLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.causal_conv1d import autograd, plain, reference
from ssmscan.ops.causal_conv1d.autograd import Inputs, Options
from ssmscan.ops.decoding import check_state, compiled, fused, leading_axes
from ssmscan.ops.packing import check_sequences, pack
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WIDEST = 8


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    activation: str | None = None,
    h0: Float[Tensor, "b w-1 d"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b w-1 d"]]:
    """Convolve each channel with its own short kernel over the present and the last w - 1 inputs.

    .. math:: y_t = \\mathrm{act}\\Big(\\mathrm{bias} + \\sum_{k=0}^{w-1} \\mathrm{weight}_k \\, x_{t-(w-1)+k}\\Big)

    The last column of ``weight`` meets the present input, as in a ``torch.nn.Conv1d`` with padding on the left. The
    state holds the last w - 1 inputs, the oldest first.

    Args:
        x: input, (b, l, d), float32, bfloat16 or float16 (float64 off the Triton backend).
        weight: the kernels, (d, w), with a width w of 2 to 8.
        bias: (d,); None is 0.
        activation: "silu", also named "swish", for z·σ(z), or None.
        h0: the inputs before the first one, (b, w - 1, d), or (s, w - 1, d) with ``cu_seqlens``; None is zeros.
        reverse: run from the right end to the left: y_t then depends on x_t and the w - 1 inputs to its right. ``h0``
            holds what lies beyond the right end, and the returned state is that of the left end. Both are in scan
            order: the row next to the sequence comes last.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (b, l, d) in x's dtype, and the final state, (b, w - 1, d) or (s, w - 1, d), in float32 (float64 when an
        input is). After fewer than w - 1 inputs it still holds rows of ``h0``.

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, width, device, activation or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    The convolution before the scan of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (2023), section 3.4.

    Example:
        >>> import torch
        >>> from ssmscan import causal_conv1d
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
        >>> y, h = causal_conv1d(x, torch.tensor([[10.0, 1.0]]))
        >>> y.flatten().tolist(), h.flatten().tolist()
        ([1.0, 12.0, 23.0], [3.0])
    """
    silu = _check("causal_conv1d", "b, l, d", x, weight, bias, activation, {"h0": h0})
    check_flags("causal_conv1d", reverse=reverse)
    dtype = state_dtype(x, weight, bias, h0)
    implementation = choose("causal_conv1d", backend, x.device.type, dtype)
    state = (weight.shape[1] - 1, x.shape[2])
    count = check_sequences("causal_conv1d", x, cu_seqlens, h0, "w-1, d", state, "x and weight")
    options = Options(silu, reverse)
    if cu_seqlens is None:
        return _run(Inputs(x, weight, bias, h0, None, None), options, implementation)
    sequence, valid = pack(cu_seqlens, x.shape[1])
    # The first token of each sequence, and the length.
    bounds = torch.searchsorted(sequence, torch.arange(count + 1, device=x.device, dtype=sequence.dtype))
    # A state is forgotten after w - 1 tokens, so NaN for bad bounds has to come by the weight to reach every output.
    poison = torch.where(valid, x.new_zeros((), dtype=dtype), torch.nan)
    y, h = _run(Inputs(x, weight + poison, bias, h0, sequence, bounds), options, implementation)
    return y, h + poison


def _run(inputs: Inputs, options: Options, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation == "reference":
        return reference.causal_conv1d(*inputs, *options)
    if implementation == "torch":
        return plain.causal_conv1d(inputs, options)
    return autograd.causal_conv1d(inputs, options, implementation)


def causal_conv1d_step(
    x: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    activation: str | None = None,
    h: Float[Tensor, "rows k d"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b l d"]:
    """Advance :func:`causal_conv1d` by one token or several, updating the state in place.

    .. math:: y = \\mathrm{act}\\Big(\\mathrm{bias} + \\sum_{k=0}^{w-2} \\mathrm{weight}_k h_k
        + \\mathrm{weight}_{w-1} x\\Big), \\qquad h \\leftarrow (h_1, \\dots, h_{w-2}, x)

    Args:
        x: input of one token, (b, d), or of several, (b, l, d), which have the results of l steps, to the last bit.
        weight, bias, activation: as in :func:`causal_conv1d`.
        h: the state, (b, w - 1, d), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is). It may hold older inputs before them, up to
            8 in all, which move up with the others, as in the caches of other libraries.
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import causal_conv1d_step
        >>> h = torch.tensor([1.0, 2.0]).view(1, 2, 1)
        >>> y = causal_conv1d_step(torch.full((1, 1), 3.0), torch.tensor([[100.0, 10.0, 1.0]]), h=h)
        >>> y.item(), h.flatten().tolist()
        (123.0, [2.0, 3.0])
    """
    leading = leading_axes("causal_conv1d_step", x, "d")
    silu = _check("causal_conv1d_step", leading + "d", x, weight, bias, activation, {"h": h})
    d, w = weight.shape
    older = h is not None and h.dim() == 3 and w <= h.shape[1] <= WIDEST
    rows = h.shape[1] if older else w - 1
    check_state("causal_conv1d_step", h, "w-1, d", x.shape[0], (rows, d), state_indices)
    dtype = state_dtype(x, weight, bias, h)
    if fused("causal_conv1d_step", dtype, h, x, weight, bias):
        return autograd.causal_conv1d_step(x, weight, bias, h, state_indices, silu)
    if compiled("causal_conv1d_step", dtype, h, x, weight, bias):
        from ssmscan.ops.causal_conv1d.cpu_step import causal_conv1d_step as step

        return step(x, weight, bias, h, state_indices, silu)
    return reference.causal_conv1d_step(x, weight, bias, h, state_indices, silu)


def _check(
    function: str,
    axes: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: dict[str, Tensor | None],
) -> bool:
    """Refuse what is not a convolution; return whether SiLU follows it."""
    check_tensors(function, {"x": x, "weight": weight}, bias=bias, **state)
    check_rank(function, "x", x, axes)
    check_rank(function, "weight", weight, "d, w")
    d, w = x.shape[-1], weight.shape[1]
    check_shape(function, "weight", weight, "d, w", (d, w), "x")
    check_shape(function, "bias", bias, "d", (d,), "x")
    if not 2 <= w <= WIDEST:
        rule = f"weight must have a width w of 2 to {WIDEST}"
        raise ValueError(error(function, rule, w, "Pass it as (d, w)."))
    if activation not in (None, "silu", "swish"):
        raise ValueError(error(function, 'activation must be None, "silu" or "swish"', repr(activation)))
    return activation is not None
