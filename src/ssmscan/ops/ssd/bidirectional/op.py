"""ssd_bidirectional: Mamba-2's scan from both ends, in the additive form and in Hydra's quasi-separable one."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.ops.packing import enter
from ssmscan.ops.recurrence import decay_rates
from ssmscan.ops.ssd.bidirectional import autograd, plain, reference
from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.op import check
from ssmscan.shapes import check_flags, check_shape, check_tensors, state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def ssd_bidirectional(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h ..."] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    *,
    dt_rev: Float[Tensor, "b l h"] | None = None,
    B_rev: Float[Tensor, "b l g n"] | None = None,
    C_rev: Float[Tensor, "b l g n"] | None = None,
    shift: bool = False,
    dt_bias: Float[Tensor, " h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    A_is_log: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b l h p"]:
    """Add Mamba-2's scan from the left, its scan from the right, and the input.

    With SS the scan of :func:`ssmscan.ssd` without D, z and initial state, and :math:`\\overleftarrow{x}` a sequence
    read from its end,

    .. math::
        y = \\bigl(\\mathrm{SS}(x) + \\overleftarrow{\\mathrm{SS}}(\\overleftarrow{x}) + D \\odot x\\bigr)
            \\odot \\mathrm{silu}(z)

    where each token meets itself in both scans. With ``shift`` each scan's output moves on by one token, so that it
    holds what came strictly before, and a token meets itself in D alone: the quasi-separable form.

    Args:
        x: input, (b, l, h, p): h heads of p channels. float32, bfloat16 or float16 (float64 off the Triton backend).
        dt: step sizes of the scan from the left, before bias, softplus and clamping, (b, l, h).
        A: rate of decay of each head in both directions, (h), negative for a state that forgets. float32 is
            recommended.
        B: input directions, (b, l, g, n): g groups of n states. h is a multiple of g: head i reads group i // (h / g).
        C: output directions, (b, l, g, n).
        D: how much of the input is added to the output, (h) or (h, p); None is nothing.
        z: gate, (b, l, h, p): the output is multiplied by silu(z); None is no gate.
        dt_rev: step sizes of the scan from the right, (b, l, h); None is ``dt``.
        B_rev: its input directions, (b, l, g, n); None is ``B``.
        C_rev: its output directions, (b, l, g, n); None is ``C``.
        shift: whether a token leaves itself out of both scans.
        dt_bias: added to dt and dt_rev, (h); None is 0.
        dt_softplus: whether step sizes go through softplus.
        dt_limit: least and largest step size, of both scans.
        A_is_log: whether A is given by its logarithm log(-A), as models keep it: -exp(A) stands in its place then.
        cu_seqlens: int32 or int64 (s+1,), 0 = c_0 <= ... <= c_s = l: the bounds of s sequences packed along the
            length of a batch of 1. Empty sequences are legal. On a GPU bad values cannot be refused without stalling
            it; they turn the output into NaN.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see :mod:`ssmscan.backend`.

    Returns:
        y, (b, l, h, p), in x's dtype. There is no state to return: every output has seen the whole sequence.

    Raises:
        TypeError: an argument is not a floating tensor, or ``cu_seqlens`` not an integer one.
        ValueError: a wrong shape, device, dt_limit or backend name, or bad ``cu_seqlens``.
        RuntimeError: the named backend cannot run here.

    See Hwang, Lahoti, Dao and Gu, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (2024),
    section 3: the additive form is among those it compares, the shifted one is Hydra.

    Example:
        >>> import torch
        >>> from ssmscan import ssd_bidirectional
        >>> x = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
        >>> dt, A, B, D = torch.ones(1, 3, 1), torch.zeros(1), torch.ones(1, 3, 1, 1), torch.ones(1)
        >>> ssd_bidirectional(x, dt, A, B, B, D).flatten().tolist()
        [113.0, 131.0, 311.0]
        >>> ssd_bidirectional(x, dt, A, B, B, D, shift=True).flatten().tolist()
        [111.0, 111.0, 111.0]
    """
    name = "ssd_bidirectional"
    check(name, "b, l, ", x, dt, A, B, C, D, z, dt_bias, dt_limit, None)
    check_tensors(name, {"x": x}, dt_rev=dt_rev, B_rev=B_rev, C_rev=C_rev)
    check_flags(name, shift=shift, dt_softplus=dt_softplus, A_is_log=A_is_log)
    check_shape(name, "dt_rev", dt_rev, "b, l, h", dt.shape, "dt")
    check_shape(name, "B_rev", B_rev, "b, l, g, n", B.shape, "B")
    check_shape(name, "C_rev", C_rev, "b, l, g, n", C.shape, "C")
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias)
    state = (*x.shape[2:], B.shape[3])
    implementation, sequence, h0 = enter(name, backend, x, dtype, cu_seqlens, None, "h, p, n", state, "x and B")
    low, high = map(float, dt_limit)
    A = decay_rates(A, A_is_log, dtype)
    inputs = Inputs(x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias, h0, sequence)
    options = Options(dt_softplus, low, high, shift)
    if implementation == "reference":
        return reference.ssd_bidirectional(inputs, options)
    if implementation == "torch":
        # Autocast would round the matrix products to bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            return plain.ssd_bidirectional(inputs, options)
    return autograd.ssd_bidirectional(inputs, options, implementation)
