"""RMSNorm, with its statistics in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, and scale.

    .. math:: y = \\frac{x}{\\sqrt{\\mathrm{mean}(x^2) + \\epsilon}} \\cdot weight

    Args:
        hidden_size: the length m of the last axis.
        eps: added to the mean square. Default 1e-6.
        dtype: dtype of the weight; None is PyTorch's default.

    The forward takes x, (..., m), and returns y in its shape and dtype; it computes in float32 or wider.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

    Example:
        >>> import torch
        >>> from ssmscan.layers import RMSNorm
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)
