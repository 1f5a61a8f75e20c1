"""matrix_scan: a matrix state whose rows decay, H = exp(log_a)·H + X."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.ops.decoding import check_state, fused, leading_axes
from ssmscan.ops.matrix_scan import autograd, plain, reference
from ssmscan.ops.matrix_scan.autograd import Inputs, Options
from ssmscan.ops.packing import enter, first_tokens
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def matrix_scan(
    x: Float[Tensor, "b l r c"],
    log_a: Float[Tensor, "b l r"] | None = None,
    *,
    cumsum_log_a: Float[Tensor, "b l r"] | None = None,
    h0: Float[Tensor, "b r c"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l r c"], Float[Tensor, "b r c"]]:
    """Sum matrices over time, each row of the sum decaying at its own rate.

    .. math:: H_t = \\mathrm{diag}(e^{\\log a_t}) H_{t-1} + X_t, \\qquad Y_t = H_t

    Args:
        x: the matrices X, (b, l, r, c), float32, bfloat16 or float16 (float64 off the Triton backend).
        log_a: natural logarithm of each row's decay, (b, l, r). float32 is recommended: bfloat16 rounds the
            logarithm to three digits, which a long memory feels.
        cumsum_log_a: instead of ``log_a``, its cumulative sum A, (b, l, r): between the tokens j and t a row decays
            by exp(A_t - A_j). The sum runs in scan order (with ``reverse`` from the right end), it is that of each
            packed sequence by itself, and before the first token it is 0, so that h0 decays by exp(A_t) until the
            token t. Differences are taken in float32; those of a sum near -10^4 keep three digits, and a decay of
            zero has none: prefer ``log_a``.
        h0: initial state, (b, r, c), or (s, r, c) with ``cu_seqlens``; None is zero.
        reverse: run from the right end to the left. ``h0`` then enters at the right end, and the returned state is
            the one at the left end.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, the states H, (b, l, r, c) in x's dtype, and the final one, (b, r, c) or (s, r, c), in float32 (float64
        when an input is).

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, device or backend name, bad ``cu_seqlens``, or not exactly one of log_a and
            cumsum_log_a.
        RuntimeError: the named backend cannot run here.

    With X_t = v_t k_t^T this is the state of gated linear attention; see Yang et al., "Gated Linear Attention
    Transformers with Hardware-Efficient Training" (2024), section 4.1.

    Example:
        >>> import torch
        >>> from ssmscan import matrix_scan
        >>> x, log_a = torch.ones(1, 3, 1, 2), torch.full((1, 3, 1), 0.5).log()
        >>> y, h = matrix_scan(x, log_a)
        >>> y[0, :, 0].tolist(), h.tolist()
        ([[1.0, 1.0], [1.5, 1.5], [1.75, 1.75]], [[[1.75, 1.75]]])
    """
    decay, cumulative = _check("matrix_scan", "b, l, r, c", x, log_a, cumsum_log_a, h0)
    check_flags("matrix_scan", reverse=reverse)
    dtype = state_dtype(x, decay, h0)
    implementation, sequence, h0 = enter("matrix_scan", backend, x, dtype, cu_seqlens, h0, "r, c", x.shape[2:])
    if cumulative:
        decay = _differences(decay.to(dtype), sequence, reverse)
    inputs, options = Inputs(x, decay, h0, sequence), Options(reverse)
    if implementation == "reference":
        return reference.matrix_scan(*inputs, *options)
    if implementation == "torch":
        return plain.matrix_scan(inputs, options)
    return autograd.matrix_scan(inputs, options, implementation)


def matrix_scan_step(
    x: Float[Tensor, "b r c"] | Float[Tensor, "b l r c"],
    log_a: Float[Tensor, "b r"] | Float[Tensor, "b l r"],
    *,
    h: Float[Tensor, "rows r c"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b r c"] | Float[Tensor, "b l r c"]:
    """Advance :func:`matrix_scan` by one token or several, updating the state in place.

    .. math:: H \\leftarrow \\mathrm{diag}(e^{\\log a}) H + X, \\qquad Y = H

    Args:
        x, log_a: as in :func:`matrix_scan`, without the length for one token: (b, r, c) and (b, r). With it, l tokens
            have the results of l steps, to the last bit.
        h: the state, (b, r, c), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`matrix_scan`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import matrix_scan_step
        >>> h = torch.ones(1, 1, 2)
        >>> matrix_scan_step(torch.ones(1, 1, 2), torch.full((1, 1), 0.5).log(), h=h).tolist(), h.tolist()
        ([[[1.5, 1.5]]], [[[1.5, 1.5]]])
    """
    leading = leading_axes("matrix_scan_step", x, "r, c")
    _check("matrix_scan_step", leading + "r, c", x, log_a, None, h)
    check_state("matrix_scan_step", h, "r, c", x.shape[0], x.shape[-2:], state_indices)
    if fused("matrix_scan_step", state_dtype(x, log_a, h), h, x, log_a):
        return autograd.matrix_scan_step(x, log_a, h, state_indices)
    return reference.matrix_scan_step(x, log_a, h, state_indices)


def _check(
    function: str, axes: str, x: Tensor, log_a: Tensor | None, cumsum_log_a: Tensor | None, h: Tensor | None
) -> tuple[Tensor, bool]:
    """Refuse what is not a scan; return the logarithmic decay and whether it is a cumulative sum."""
    decay = cumsum_log_a if log_a is None else log_a
    if decay is None or (log_a is not None and cumsum_log_a is not None):
        rule = "exactly one of log_a and cumsum_log_a must be given"
        raise ValueError(error(function, rule, "neither" if decay is None else "both", "Pass the decay once."))
    name = "cumsum_log_a" if log_a is None else "log_a"
    check_tensors(function, {"x": x, name: decay}, **{"h" if function.endswith("step") else "h0": h})
    check_rank(function, "x", x, axes)
    check_shape(function, name, decay, axes.removesuffix(", c"), x.shape[:-1], "x")
    return decay, log_a is None


def _differences(total: Tensor, sequence: Tensor | None, reverse: bool) -> Tensor:
    """Each token's part of a cumulative sum that starts from 0 in every sequence."""
    if reverse:
        steps = torch.cat([total[:, :-1] - total[:, 1:], total[:, -1:]], 1)
    else:
        steps = torch.cat([total[:, :1], total[:, 1:] - total[:, :-1]], 1)
    if sequence is not None and sequence.shape[0] > 0:
        steps = torch.where(first_tokens(sequence, reverse)[:, None], total, steps)
    return steps
