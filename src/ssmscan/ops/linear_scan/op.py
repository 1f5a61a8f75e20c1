"""linear_scan: the gated diagonal recurrence h = a·h + b·x, y = c·h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ssmscan.ops.decoding import check_state, fused, leading_axes
from ssmscan.ops.linear_scan import autograd, plain, reference
from ssmscan.ops.linear_scan.autograd import Inputs, Options
from ssmscan.ops.packing import enter
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def linear_scan(
    x: Float[Tensor, "b l d"],
    a: Float[Tensor, "b l d"] | None = None,
    b: Float[Tensor, "b l d"] | None = None,
    c: Float[Tensor, "b l d"] | None = None,
    *,
    log_a: Float[Tensor, "b l d"] | None = None,
    h0: Float[Tensor, "b d"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
    """Run a gated diagonal linear recurrence over time, each channel on its own.

    .. math:: h_t = a_t h_{t-1} + b_t x_t, \\qquad y_t = c_t h_t

    Args:
        x: input, (b, l, d), float32, bfloat16 or float16 (float64 off the Triton backend).
        a: decay, (b, l, d), any real number. Give either this or ``log_a``.
        b: input gate, (b, l, d); None is 1.
        c: output gate, (b, l, d); None is 1.
        log_a: natural logarithm of the decay, (b, l, d). float32 is recommended: bfloat16 rounds a decay
            of 0.999 to 1.
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
        ValueError: a wrong shape, device or backend name, bad ``cu_seqlens``, or not exactly one of a and log_a.
        RuntimeError: the named backend cannot run here.

    The recurrence is that of gated linear RNNs and S4's diagonal form; see Martin and Cundy, "Parallelizing Linear
    Recurrent Neural Nets Over Sequence Length" (2018), section 2.

    Example:
        >>> import torch
        >>> from ssmscan import linear_scan
        >>> x, a = torch.ones(1, 4, 1), torch.full((1, 4, 1), 0.5)
        >>> y, h = linear_scan(x, a)
        >>> y.flatten().tolist(), h.flatten().tolist()
        ([1.0, 1.5, 1.75, 1.875], [1.875])
    """
    decay, log = _check("linear_scan", "b, l, d", x, a, b, c, log_a, h0)
    check_flags("linear_scan", reverse=reverse)
    dtype = state_dtype(x, decay, b, c, h0)
    implementation, sequence, h0 = enter("linear_scan", backend, x, dtype, cu_seqlens, h0, "d", x.shape[2:])
    inputs, options = Inputs(x, decay, b, c, h0, sequence), Options(log, reverse)
    if implementation == "reference":
        return reference.linear_scan(*inputs, *options)
    if implementation == "torch":
        return plain.linear_scan(inputs, options)
    return autograd.linear_scan(inputs, options, implementation)


def linear_scan_step(
    x: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    a: Float[Tensor, "b d"] | Float[Tensor, "b l d"] | None = None,
    b: Float[Tensor, "b d"] | Float[Tensor, "b l d"] | None = None,
    c: Float[Tensor, "b d"] | Float[Tensor, "b l d"] | None = None,
    *,
    log_a: Float[Tensor, "b d"] | Float[Tensor, "b l d"] | None = None,
    h: Float[Tensor, "rows d"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b l d"]:
    """Advance :func:`linear_scan` by one token or several, updating the state in place.

    .. math:: h \\leftarrow a h + b x, \\qquad y = c h

    Args:
        x, a, b, c, log_a: as in :func:`linear_scan`, without the length for one token: (b, d). With it, l tokens have
            the results of l steps, to the last bit.
        h: the state, (b, d), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import linear_scan_step
        >>> h = torch.ones(1, 2)
        >>> linear_scan_step(torch.ones(1, 2), torch.full((1, 2), 0.5), h=h).tolist(), h.tolist()
        ([[1.5, 1.5]], [[1.5, 1.5]])
    """
    leading = leading_axes("linear_scan_step", x, "d")
    decay, log = _check("linear_scan_step", leading + "d", x, a, b, c, log_a, h)
    check_state("linear_scan_step", h, "d", x.shape[0], x.shape[-1:], state_indices)
    if fused("linear_scan_step", state_dtype(x, decay, b, c, h), h, x, decay, b, c):
        return autograd.linear_scan_step(x, decay, b, c, h, state_indices, log)
    return reference.linear_scan_step(x, decay, b, c, h, state_indices, log)


def _check(
    function: str,
    axes: str,
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    log_a: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, bool]:
    """Refuse what is not a scan; return the decay and whether it is a logarithm."""
    decay = log_a if a is None else a
    if decay is None or (a is not None and log_a is not None):
        given = "neither" if decay is None else "both"
        raise ValueError(error(function, "exactly one of a and log_a must be given", given, "Pass the decay once."))
    name = "log_a" if a is None else "a"
    check_tensors(function, {"x": x, name: decay}, b=b, c=c, **{"h" if function.endswith("step") else "h0": h})
    check_rank(function, "x", x, axes)
    for argument, tensor in ((name, decay), ("b", b), ("c", c)):
        check_shape(function, argument, tensor, axes, x.shape, "x")
    return decay, a is None
