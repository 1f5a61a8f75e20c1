"""s4d: the time-invariant diagonal state space model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ssmscan.ops.decoding import advance, check_state, fused, leading_axes
from ssmscan.ops.packing import enter
from ssmscan.ops.s4d import autograd, plain, reference
from ssmscan.ops.s4d.system import discretise
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int


def s4d(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, " d"],
    A: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    B: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    C: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    D: Float[Tensor, " d"] | None = None,
    *,
    mode: Literal["auto", "conv", "recurrent"] = "auto",
    h0: Float[Tensor, "b d n"] | Complex[Tensor, "b d n"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"] | Complex[Tensor, "b d n"]]:
    """Run a time-invariant diagonal state space model over time, each channel on its own, n states in each.

    .. math::
        \\bar A = e^{\\Delta A}, \\quad \\bar B = \\frac{e^{\\Delta A} - 1}{A} B, \\qquad
        h_t = \\bar A h_{t-1} + \\bar B x_t, \\qquad y_t = \\sum_n C h_t + D x_t

    With complex A, B, C each state stands for itself and its conjugate: :math:`y_t = 2 \\mathrm{Re} \\sum_n C h_t
    + D x_t`. Both modes compute the same.

    Args:
        x: input, (b, l, d), float32, bfloat16 or float16 (float64 off the Triton backend).
        dt: step size, (d,), positive.
        A: poles, (d, n), real or complex, the real part negative for a memory that fades.
        B: input weights, (d, n), complex when A is.
        C: output weights, (d, n), complex when A is.
        D: skip, (d,); None is zero.
        mode: "conv" convolves with the whole impulse response by FFT; "recurrent" carries the state along, on a GPU
            from chunk to chunk of 64 steps. Where an input is not finite, "conv" spoils its whole sequence and channel.
            "auto" takes what was measured to be faster on the device: "recurrent" on each of them so far.
        h0: initial state, (b, d, n), or (s, d, n) with ``cu_seqlens``, complex when A is; None is zero.
        reverse: run from the right end to the left. ``h0`` then enters at the right end, and the returned state is
            the one at the left end.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN. An FFT would mix the sequences: "conv", too, runs them in chunks.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`. "triton" and "cpu" run
            mode "recurrent"; the FFT is PyTorch's, so "auto" takes "torch" for mode "conv".

    Returns:
        y, (b, l, d) in x's dtype, and the final state, (b, d, n) or (s, d, n), in float32 or complex64 (float64 or
        complex128 when an input is).

    Raises:
        TypeError: an argument is not a tensor of these kinds, or not all of A, B, C and h0 are real or all complex.
        ValueError: a wrong shape, device, mode or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022), sections 2 and 3.

    Example:
        >>> import torch
        >>> from ssmscan import s4d
        >>> one = torch.ones(1, 1)
        >>> y, h = s4d(torch.ones(1, 3, 1), torch.ones(1), -0.6931472 * one, one, one)
        >>> [round(v, 4) for v in y.flatten().tolist()], round(h.item(), 4)
        ([0.7213, 1.082, 1.2624], 1.2624)
    """
    if mode not in ("auto", "conv", "recurrent"):
        raise ValueError(error("s4d", 'mode must be "auto", "conv" or "recurrent"', repr(mode)))
    check_flags("s4d", reverse=reverse)
    real, dtype = _check("s4d", "b, l, d", x, dt, A, B, C, D, h0)
    implementation, sequence, h0 = enter("s4d", backend, x, dtype, cu_seqlens, h0, "d, n", A.shape, "x and A")
    if mode == "conv" and implementation in ("triton", "cpu"):
        if backend != "auto":
            raise RuntimeError(
                error("s4d", f'backend="{backend}" needs mode="recurrent"', f'mode="{mode}"', 'Use backend="auto".')
            )
        implementation = "torch"
    if implementation == "reference":
        return reference.s4d(x, dt, A, B, C, D, h0, sequence, reverse, dtype)
    z, B = discretise(dt, A, B, dtype)
    if implementation == "torch":
        return plain.s4d(x, z, B, C.to(dtype), D, h0, sequence, mode, reverse)
    D, h0 = D if D is None else D.to(real), h0 if h0 is None else h0.to(dtype)
    inputs = autograd.Inputs(x, z, B, C.to(dtype), D, h0, sequence)
    return autograd.s4d(inputs, autograd.Options(reverse), implementation)


def s4d_step(
    x: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    dt: Float[Tensor, " d"],
    A: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    B: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    C: Float[Tensor, "d n"] | Complex[Tensor, "d n"],
    D: Float[Tensor, " d"] | None = None,
    *,
    h: Float[Tensor, "rows d n"] | Complex[Tensor, "rows d n"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b l d"]:
    """Advance :func:`s4d` by one token or several, updating the state in place.

    .. math:: h \\leftarrow \\bar A h + \\bar B x, \\qquad y = \\sum_n C h + D x

    Args:
        x: input of one token, (b, d), or of several, (b, l, d), which have the results of l steps, to the last bit.
        dt, A, B, C, D: as in :func:`s4d`.
        h: the state, (b, d, n), of any floating dtype, or complex when A is. Overwritten with the next state, rounded
            once a token; the arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`s4d`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import s4d_step
        >>> one, h = torch.ones(1, 1), torch.zeros(1, 1, 1)
        >>> y = s4d_step(one, torch.ones(1), -0.6931472 * one, one, one, h=h)
        >>> round(y.item(), 4), round(h.item(), 4)
        (0.7213, 0.7213)
    """
    leading = leading_axes("s4d_step", x, "d")
    real, dtype = _check("s4d_step", leading + "d", x, dt, A, B, C, D, h)
    check_state("s4d_step", h, "d, n", x.shape[0], A.shape, state_indices)
    if fused("s4d_step", real, h, x, dt, A, B, C, D):
        return autograd.s4d_step(x, dt, A, B, C, D, h, state_indices)
    z, B = discretise(dt, A, B, dtype)
    a = z.exp().to(dtype)

    def token(x, h):
        after, y = reference.advance(x, a, B, C, D, h)
        return y, after

    return advance(token, (x,), h, state_indices, x.dim() == 3, dtype)


def _check(
    function: str,
    axes: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h: Tensor | None,
) -> tuple[torch.dtype, torch.dtype]:
    """Refuse what is no such system; return the dtypes of its sums and of its state."""
    state = "h" if function.endswith("step") else "h0"
    poles = {name: _real(tensor) for name, tensor in (("A", A), ("B", B), ("C", C), (state, h))}
    check_tensors(function, {"x": x, "dt": dt, **{name: poles[name] for name in "ABC"}}, D=D, **{state: poles[state]})
    given = {name: t for name, t in (("A", A), ("B", B), ("C", C), (state, h)) if t is not None}
    # The majority of A, B and C rules.
    complex_ = sum(given[name].is_complex() for name in "ABC") > 1
    for name, tensor in given.items():
        if tensor.is_complex() != complex_:
            others = " and ".join(other for other in "ABC" if other != name)
            rule = f"{name} must be {'complex' if complex_ else 'real'} like {others}"
            raise TypeError(error(function, rule, tensor.dtype, "Convert it."))
    check_rank(function, "x", x, axes)
    d = x.shape[-1]
    check_shape(function, "dt", dt, "d", (d,), "x")
    check_rank(function, "A", A, "d, n")
    check_shape(function, "A", A, "d, n", (d, A.shape[1]), "x")
    check_shape(function, "B", B, "d, n", A.shape, "A")
    check_shape(function, "C", C, "d, n", A.shape, "A")
    check_shape(function, "D", D, "d", (d,), "x")
    real = state_dtype(x, dt, *poles.values(), D)
    if not complex_:
        return real, real
    return real, torch.complex128 if real is torch.float64 else torch.complex64


def _real(tensor: Tensor | None) -> Tensor | None:
    """The real part, whose dtype and device are checked in the tensor's stead."""
    if isinstance(tensor, Tensor) and tensor.is_complex() and tensor.layout is torch.strided and not tensor.is_nested:
        return tensor.real
    return tensor
