"""Norms by the root mean square, with their statistics in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.backend import choose
from ssmscan.layers.parameters import WideParameters, wide
from ssmscan.ops import gated_rms_norm
from ssmscan.ops.registration import observed, transformed
from ssmscan.shapes import state_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


class RMSNorm(WideParameters):
    """Divide by the root mean square of the last axis, and scale.

    .. math:: y = \\frac{x}{\\sqrt{\\mathrm{mean}(x^2) + \\epsilon}} \\cdot weight

    Args:
        d_model: the length m of the last axis.
        eps: added to the mean square. Default 1e-5.
        device, dtype: of what the norm returns; None is PyTorch's default. The weight is float32 or wider always.

    The forward takes x, (..., m), and returns y in its shape and in the dtype that the module was made in or converted
    to, which is that of the layers after it where the residual stream is wider. It computes in float32 or wider.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

    Example:
        >>> import torch
        >>> from ssmscan.layers import RMSNorm
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    _keep_wide = ("weight",)
    _no_weight_decay = ("weight",)

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=wide(dtype)))
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A scale of 1."""
        nn.init.ones_(self.weight)

    def _apply(self, fn, recurse=True):
        # What the module returns follows every conversion, as the weight does not.
        self.dtype = fn(torch.empty(0, device="cpu", dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
        if self._fused(x):
            return gated_rms_norm(x, self.weight, eps=self.eps, dtype=self.dtype)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return y.to(self.dtype)

    def _fused(self, x: Tensor) -> bool:
        """Whether our kernel, which rounds to another dtype by itself, takes x: in inference, where launches count.

        A compiler fuses PyTorch's norm with what stands around it; other observers and transforms know that one.
        """
        if torch.is_grad_enabled() or observed((x, self.weight)) or transformed() or self.eps <= 0:
            return False
        return choose("RMSNorm", "auto", x.device.type, state_dtype(x, self.weight)) == "triton"

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """:func:`ssmscan.gated_rms_norm` as a module: a norm of groups of channels, with a gate before or after it.

    Args:
        d_model: number d of channels.
        eps: added to the mean square. Default 1e-5.
        groups: how many groups of channels have a mean of their own. Default 1.
        norm_before_gate: whether the gate comes after the norm. Default False.
        device, dtype: as of :class:`RMSNorm`.

    The forward takes x and z, (..., d), and returns y in x's shape and dtype.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        groups: int = 1,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, eps, device, dtype)
        self.group_size = d_model // groups
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Float[Tensor, "... d"], z: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:  # type: ignore[override]
        return gated_rms_norm(
            x, self.weight, z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )
