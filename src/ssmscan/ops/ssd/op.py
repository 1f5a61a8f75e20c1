"""ssd: Mamba-2's selective state-space scan, h = exp(dt·A)·h + dt·x⊗B, y = h·C + D·x."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.ops.decoding import check_state, compiled, fused, leading_axes
from ssmscan.ops.packing import enter
from ssmscan.ops.recurrence import decay_rates
from ssmscan.ops.ssd import autograd, plain, reference
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def ssd(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h ..."] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    *,
    dt_bias: Float[Tensor, " h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    A_is_log: bool = False,
    h0: Float[Tensor, "b h p n"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """Run Mamba-2's state-space scan: a matrix state for each head, whose decay is one number for a token and head.

    .. math::
        h_t = e^{\\Delta_t A} h_{t-1} + \\Delta_t\\, x_t \\otimes B_t, \\qquad
        y_t = (h_t C_t + D \\odot x_t) \\odot \\mathrm{silu}(z_t)

    where the step size Δ is ``dt``, plus ``dt_bias``, through softplus if ``dt_softplus``, clamped to ``dt_limit``.

    Args:
        x: input, (b, l, h, p): h heads of p channels. float32, bfloat16 or float16 (float64 off the Triton backend).
        dt: step sizes before bias, softplus and clamping, (b, l, h).
        A: rate of decay of each head, (h), negative for a state that forgets. float32 is recommended.
        B: input directions, (b, l, g, n): g groups of n states. h is a multiple of g; head i reads group i // (h / g).
        C: output directions, (b, l, g, n).
        D: how much of the input is added to the output, (h) or (h, p); None is nothing.
        z: gate, (b, l, h, p): the output is multiplied by silu(z); None is no gate.
        dt_bias: added to dt, (h); None is 0.
        dt_softplus: whether dt goes through softplus.
        dt_limit: least and largest step size.
        A_is_log: whether A is given by its logarithm log(-A), as models keep it: -exp(A) stands in its place then.
        h0: initial state, (b, h, p, n), or (s, h, p, n) with ``cu_seqlens``; None is zero.
        reverse: run from the right end to the left. ``h0`` then enters at the right end, and the returned state is
            the one at the left end.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (b, l, h, p) in x's dtype, and the final state, (b, h, p, n) or (s, h, p, n), in float32 (float64 when an
        input is).

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, device, dt_limit or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    See Dao and Gu, "Transformers are SSMs" (2024), sections 3 and 6.

    Example:
        >>> import torch
        >>> from ssmscan import ssd
        >>> x, dt, A = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), torch.tensor([0.5]).log()
        >>> B, C = torch.ones(1, 3, 1, 2), torch.tensor([1.0, 2.0]).expand(1, 3, 1, 2)
        >>> y, h = ssd(x, dt, A, B, C)
        >>> y.flatten().tolist(), h.flatten().tolist()
        ([3.0, 4.5, 5.25], [1.75, 1.75])
    """
    implementation, inputs, options = prepare(
        x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, A_is_log=A_is_log, h0=h0,
        reverse=reverse, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    if implementation == "reference":
        return reference.ssd(*inputs, *options)
    if implementation == "torch":
        # Autocast would round the matrix products to bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            return plain.ssd(inputs, options)
    return autograd.ssd(inputs, options, implementation)


def ssd_step(
    x: Float[Tensor, "b h p"] | Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b h"] | Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b g n"] | Float[Tensor, "b l g n"],
    C: Float[Tensor, "b g n"] | Float[Tensor, "b l g n"],
    D: Float[Tensor, "h ..."] | None = None,
    z: Float[Tensor, "b h p"] | Float[Tensor, "b l h p"] | None = None,
    *,
    dt_bias: Float[Tensor, " h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    A_is_log: bool = False,
    h: Float[Tensor, "rows h p n"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b h p"] | Float[Tensor, "b l h p"]:
    """Advance :func:`ssd` by one token or several, updating the state in place.

    .. math::
        h \\leftarrow e^{\\Delta A} h + \\Delta\\, x \\otimes B, \\qquad
        y = (h C + D \\odot x) \\odot \\mathrm{silu}(z)

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, A_is_log: as in :func:`ssd`, without the length for one
            token: x and z are (b, h, p) then, dt (b, h), B and C (b, g, n). With it, l tokens have the results of l
            steps, to the last bit.
        h: the state, (b, h, p, n), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`ssd`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import ssd_step
        >>> x, dt, A, B = torch.ones(1, 1, 1), torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1, 2)
        >>> h = torch.ones(1, 1, 1, 2)
        >>> ssd_step(x, dt, A, B, B, h=h).tolist(), h.tolist()
        ([[[4.0]]], [[[[2.0, 2.0]]]])
    """
    leading = leading_axes("ssd_step", x, "h, p")
    check("ssd_step", leading, x, dt, A, B, C, D, z, dt_bias, dt_limit, h)
    check_flags("ssd_step", dt_softplus=dt_softplus, A_is_log=A_is_log)
    check_state("ssd_step", h, "h, p, n", x.shape[0], (*x.shape[-2:], B.shape[-1]), state_indices)
    low, high = map(float, dt_limit)
    read = (x, dt, A, B, C, D, z, dt_bias)
    dtype = state_dtype(*read, h)
    if fused("ssd_step", dtype, h, *read):
        return autograd.ssd_step(*read, h, state_indices, bool(dt_softplus), low, high, bool(A_is_log))
    read = (x, dt, decay_rates(A, A_is_log, dtype), B, C, D, z, dt_bias)
    if compiled("ssd_step", dtype, h, *read):
        from ssmscan.ops.ssd.cpu_step import ssd_step as step

        return step(*read, h, state_indices, dt_softplus, low, high)
    return reference.ssd_step(*read, h, state_indices, dt_softplus, low, high)


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    A_is_log: bool,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[str, Inputs, Options]:
    """Check the arguments of :func:`ssd`; return the backend that runs, and what its functions take."""
    check("ssd", "b, l, ", x, dt, A, B, C, D, z, dt_bias, dt_limit, h0)
    check_flags("ssd", dt_softplus=dt_softplus, A_is_log=A_is_log, reverse=reverse)
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    state = (*x.shape[2:], B.shape[3])
    implementation, sequence, h0 = enter("ssd", backend, x, dtype, cu_seqlens, h0, "h, p, n", state, "x and B")
    low, high = map(float, dt_limit)
    A = decay_rates(A, A_is_log, dtype)
    options = Options(dt_softplus, low, high, reverse)
    return implementation, Inputs(x, dt, A, B, C, D, z, dt_bias, h0, sequence), options


def check(
    function: str,
    token: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    h: Tensor | None,
) -> None:
    """Refuse what is not a scan; ``token`` names the axes of batch and length."""
    state = {"h" if function.endswith("step") else "h0": h}
    check_tensors(function, {"x": x, "dt": dt, "A": A, "B": B, "C": C}, D=D, z=z, dt_bias=dt_bias, **state)
    check_rank(function, "x", x, token + "h, p")
    check_rank(function, "B", B, token + "g, n", "For one group, pass B.unsqueeze(-2).")
    *outer, heads, p = x.shape
    groups, n = B.shape[-2:]
    check_shape(function, "dt", dt, token + "h", (*outer, heads), "x")
    check_shape(function, "A", A, "h", (heads,), "x")
    check_shape(function, "B", B, token + "g, n", (*outer, groups, n), "x")
    check_shape(function, "C", C, token + "g, n", B.shape, "B")
    check_shape(function, "z", z, token + "h, p", x.shape, "x")
    check_shape(function, "dt_bias", dt_bias, "h", (heads,), "x")
    if D is not None and D.shape != (heads,) and D.shape != (heads, p):
        rule = f"D must have shape (h) = ({heads},) or (h, p) = ({heads}, {p}) to match x"
        raise ValueError(error(function, rule, tuple(D.shape)))
    if groups == 0 or heads % groups != 0:
        rule = f"the {heads} heads of x must be a multiple of the groups of B"
        raise ValueError(error(function, rule, groups, "Each group serves as many heads."))
    _check_limit(function, dt_limit)


def _check_limit(function: str, dt_limit: tuple[float, float]) -> None:
    rule = "dt_limit must be a pair (least, largest)"
    if not isinstance(dt_limit, tuple | list) or not all(isinstance(limit, int | float) for limit in dt_limit):
        raise TypeError(error(function, f"{rule} of numbers", repr(dt_limit)))
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(error(function, rule, dt_limit))
