"""gated_rms_norm: root-mean-square normalisation of groups of channels, gated before or after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.gated_rms_norm import autograd, plain, reference
from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options
from ssmscan.shapes import FLOATING, check_flags, check_shape, check_tensors, error, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def gated_rms_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    z: Float[Tensor, "... d"] | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... d"]:
    """Normalise groups of channels by their root-mean-square, with a gate before or after it.

    .. math::
        \\mathrm{rms}(u) = \\frac{u}{\\sqrt{\\mathrm{mean}(u^2) + \\mathrm{eps}}}, \\qquad
        y = \\mathrm{rms}(x \\, \\mathrm{silu}(z)) \\, \\mathrm{weight} \\quad \\text{or} \\quad
        y = \\mathrm{rms}(x) \\, \\mathrm{weight} \\, \\mathrm{silu}(z)

    The mean is taken in float32 (float64 for a float64 input). Squares below 1e-38 are lost there, beside an ``eps``
    of any use; those of numbers above 1e19 overflow, and the row becomes 0.

    Args:
        x: input, (..., d), float32, bfloat16 or float16 (float64 off the Triton backend).
        weight: scale of each channel, (d,).
        z: gate before its SiLU, (..., d); None is no gate.
        eps: added to the mean square, above 0. A row of zeros gives zeros, and finite gradients.
        group_size: channels that share a mean, a divisor of d; None is all d.
        norm_before_gate: take the second of the two forms. Without z they are the same.
        dtype: of y; None is that of x. bfloat16 is what a layer in bfloat16 takes of a residual stream in float32. The
            arithmetic is the same for any: y is rounded once, at its end.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (..., d), in ``dtype``, or else in that of x.

    Raises:
        TypeError: an argument is not a floating tensor, or ``dtype`` not a floating dtype.
        ValueError: a wrong shape, device or backend name, an ``eps`` that is not above 0, or a ``group_size`` that
            does not divide d.
        RuntimeError: the named backend cannot run here.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); gated as in Dao and Gu, "Transformers are SSMs"
    (2024), section 7.

    Example:
        >>> import torch
        >>> from ssmscan import gated_rms_norm
        >>> y = gated_rms_norm(torch.tensor([[3.0, -3.0, 1.0, 1.0]]), torch.ones(4), group_size=2)
        >>> y.round(decimals=3).tolist()
        [[1.0, -1.0, 1.0, 1.0]]
    """
    check_tensors("gated_rms_norm", {"x": x, "weight": weight}, z=z)
    check_flags("gated_rms_norm", norm_before_gate=norm_before_gate)
    if x.dim() == 0:
        raise ValueError(error("gated_rms_norm", "x must have shape (..., d)", "()"))
    d = x.shape[-1]
    check_shape("gated_rms_norm", "weight", weight, "d", (d,), "x")
    check_shape("gated_rms_norm", "z", z, "..., d", x.shape, "x")
    if not isinstance(eps, int | float):
        raise TypeError(error("gated_rms_norm", "eps must be a number", repr(eps)))
    if not eps > 0:
        raise ValueError(error("gated_rms_norm", "eps must be above 0", eps))
    if isinstance(group_size, bool) or not isinstance(group_size, int | torch.SymInt | None):
        raise TypeError(error("gated_rms_norm", "group_size must be an integer or None", repr(group_size)))
    if dtype is not None and dtype not in FLOATING:
        rule = "dtype must be None, float32, bfloat16, float16 or float64"
        raise TypeError(error("gated_rms_norm", rule, repr(dtype)))
    size = d if group_size is None else group_size
    # No channels, no groups.
    if d > 0 and (size <= 0 or d % size != 0):
        raise ValueError(error("gated_rms_norm", f"group_size must divide d = {d}", group_size))
    implementation = choose("gated_rms_norm", backend, x.device.type, state_dtype(x, weight, z))
    inputs, options = Inputs(x, weight, z), Options(eps, size, norm_before_gate, dtype or x.dtype)
    if implementation == "reference":
        return reference.gated_rms_norm(*inputs, eps, size, norm_before_gate, options.dtype)
    if implementation == "torch":
        return plain.gated_rms_norm(inputs, options)
    return autograd.gated_rms_norm(inputs, options, implementation)
