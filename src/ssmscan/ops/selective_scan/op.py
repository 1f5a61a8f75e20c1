"""selective_scan: the input-dependent diagonal state-space scan of Mamba-1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ssmscan.ops.decoding import check_state, compiled, fused, leading_axes
from ssmscan.ops.packing import enter
from ssmscan.ops.recurrence import decay_rates
from ssmscan.ops.selective_scan import autograd, plain, reference
from ssmscan.ops.selective_scan.autograd import Inputs, Options
from ssmscan.shapes import check_flags, check_rank, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    *,
    dt_bias: Float[Tensor, " d"] | None = None,
    dt_softplus: bool = False,
    A_is_log: bool = False,
    h0: Float[Tensor, "b d n"] | None = None,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Run Mamba's selective state-space model: n states for each channel, whose steps depend on the input.

    .. math:: \\delta_t = \\mathrm{softplus}(dt_t + dt\\_bias), \\quad
        h_t = e^{\\delta_t A} h_{t-1} + \\delta_t B_t x_t, \\quad
        y_t = (C_t \\cdot h_t + D x_t) \\, \\mathrm{silu}(z_t)

    Args:
        x: input, (b, l, d), float32, bfloat16 or float16 (float64 off the Triton backend).
        dt: step size, (b, l, d), any real number; before the softplus if there is one.
        A: decay rate of each channel and state, (d, n), n from 1 to 256. Negative for a state that forgets; float32
            is recommended.
        B: input matrix, (b, l, n), or (b, l, g, n) for g groups of d/g adjacent channels.
        C: output matrix, of B's shape.
        D: weight of the input in the output, (d,); None is 0.
        z: gate, (b, l, d), before its silu; None is no gate.
        dt_bias: added to dt, (d,); None is 0.
        dt_softplus: whether the step size is the softplus of dt + dt_bias, or that sum itself.
        A_is_log: whether A is given by its logarithm log(-A), as models keep it: -exp(A) stands in its place then.
        h0: initial state, (b, d, n), or (s, d, n) with ``cu_seqlens``; None is zero.
        reverse: run from the right end to the left. ``h0`` then enters at the right end, and the returned state is
            the one at the left end.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the outputs into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (b, l, d) in x's dtype, and the final state, (b, d, n) or (s, d, n), in float32 (float64 when an input is).

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, device or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    The recurrence is Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023),
    section 3.2, with the simplified discretisation of B.

    Example:
        >>> import torch
        >>> from ssmscan import selective_scan
        >>> x, dt, A = torch.ones(1, 3, 1), torch.ones(1, 3, 1), torch.zeros(1, 2)
        >>> B = C = torch.ones(1, 3, 2)
        >>> y, h = selective_scan(x, dt, A, B, C)
        >>> y.flatten().tolist(), h.flatten().tolist()
        ([2.0, 4.0, 6.0], [3.0, 3.0])
    """
    implementation, inputs, options = prepare(
        x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, A_is_log=A_is_log, h0=h0, reverse=reverse,
        cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    if implementation == "reference":
        return reference.selective_scan(*inputs, *options)
    if implementation == "torch":
        return plain.selective_scan(inputs, options)
    return autograd.selective_scan(inputs, options, implementation)


def selective_scan_step(
    x: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    dt: Float[Tensor, "b d"] | Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"] | Float[Tensor, "b g n"] | Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    C: Float[Tensor, "b n"] | Float[Tensor, "b g n"] | Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | Float[Tensor, "b l d"] | None = None,
    *,
    dt_bias: Float[Tensor, " d"] | None = None,
    dt_softplus: bool = False,
    A_is_log: bool = False,
    h: Float[Tensor, "rows d n"],
    state_indices: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b l d"]:
    """Advance :func:`selective_scan` by one token or several, updating the state in place.

    .. math:: h \\leftarrow e^{\\delta A} h + \\delta B x, \\qquad y = (C \\cdot h + D x) \\, \\mathrm{silu}(z)

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log: as in :func:`selective_scan`, without the length for one
            token: x, dt and z are (b, d) then, B and C (b, n) or (b, g, n). With it, l tokens have the results of l
            steps, to the last bit.
        h: the state, (b, d, n), of any floating dtype. Overwritten with the next state, rounded once a token; the
            arithmetic is in float32 (float64 when h or an input is).
        state_indices: int32 or int64 (b,): the row of ``h`` that each batch row reads and writes, where ``h`` is a
            pool of any number of states; None is h's rows in order. -1 skips a batch row: its y is 0, and no state
            changes. No two may be alike, or the results are undefined. On a GPU, what is no row of ``h`` is as -1.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as :func:`selective_scan`; also on the CPU, ``state_indices`` that are no rows of ``h``.

    Example:
        >>> import torch
        >>> from ssmscan import selective_scan_step
        >>> h, one = torch.ones(1, 1, 2), torch.ones(1, 1)
        >>> y = selective_scan_step(one, one, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), h=h)
        >>> y.tolist(), h.tolist()
        ([[4.0]], [[[2.0, 2.0]]])
    """
    leading = leading_axes("selective_scan_step", x, "d")
    B, C = check("selective_scan_step", leading.rstrip(", "), x, dt, A, B, C, D, z, dt_bias, h)
    check_flags("selective_scan_step", dt_softplus=dt_softplus, A_is_log=A_is_log)
    check_state("selective_scan_step", h, "d, n", x.shape[0], A.shape, state_indices)
    read = (x, dt, A, B, C, D, z, dt_bias)
    dtype = state_dtype(*read, h)
    if fused("selective_scan_step", dtype, h, *read):
        return autograd.selective_scan_step(*read, h, state_indices, bool(dt_softplus), bool(A_is_log))
    read = (x, dt, decay_rates(A, A_is_log, dtype), B, C, D, z, dt_bias)
    if compiled("selective_scan_step", dtype, h, *read):
        from ssmscan.ops.selective_scan.cpu_step import selective_scan_step as step

        return step(*read, h, state_indices, dt_softplus)
    return reference.selective_scan_step(*read, h, state_indices, dt_softplus)


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
    A_is_log: bool,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[str, Inputs, Options]:
    """Check the arguments of :func:`selective_scan`; return the backend that runs, and what its functions take."""
    B, C = check("selective_scan", "b, l", x, dt, A, B, C, D, z, dt_bias, h0)
    check_flags("selective_scan", dt_softplus=dt_softplus, A_is_log=A_is_log, reverse=reverse)
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    implementation, sequence, h0 = enter(
        "selective_scan", backend, x, dtype, cu_seqlens, h0, "d, n", A.shape, "x and A"
    )
    A = decay_rates(A, A_is_log, dtype)
    return implementation, Inputs(x, dt, A, B, C, D, z, dt_bias, h0, sequence), Options(dt_softplus, reverse)


def check(
    function: str,
    axes: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Refuse what is not a scan; return B and C with an axis of groups. ``axes`` are those before the channels."""
    state = {"h" if function.endswith("step") else "h0": h}
    check_tensors(function, {"x": x, "dt": dt, "A": A, "B": B, "C": C}, D=D, z=z, dt_bias=dt_bias, **state)
    check_rank(function, "x", x, f"{axes}, d")
    d = x.shape[-1]
    leading = tuple(x.shape[:-1])
    for name, tensor in (("dt", dt), ("z", z)):
        check_shape(function, name, tensor, f"{axes}, d", x.shape, "x")
    check_rank(function, "A", A, "d, n")
    n = A.shape[1]
    check_shape(function, "A", A, "d, n", (d, n), "x")
    if not 1 <= n <= 256:
        raise ValueError(error(function, "A must have 1 to 256 states n in its shape (d, n)", tuple(A.shape)))
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        check_shape(function, name, tensor, "d", (d,), "x")
    grouped = B.dim() == len(leading) + 2
    if not grouped:
        check_shape(function, "B", B, f"{axes}, n", (*leading, n), "x and A")
    else:
        g = B.shape[-2]
        check_shape(function, "B", B, f"{axes}, g, n", (*leading, g, n), "x and A")
        if g == 0 or d % g != 0:
            rule = f"B must have a number of groups g that divides the {d} channels of x in its shape ({axes}, g, n)"
            raise ValueError(error(function, rule, tuple(B.shape)))
    check_shape(function, "C", C, f"{axes}, g, n" if grouped else f"{axes}, n", B.shape, "B")
    return (B, C) if grouped else (B.unsqueeze(-2), C.unsqueeze(-2))
