"""MLP: a gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.mixer import positive
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """A feed-forward layer whose hidden values are gated: SwiGLU, or GeGLU.

    .. math:: (v, g) = W_1 x, \\qquad y = W_2 (v \\, \\mathrm{act}(g))

    Args:
        d_model: width m of the input and the output.
        d_intermediate: number of hidden values; W_1 has twice as many rows, [v, g].
        activation: of the gate, "silu" (SwiGLU) or "gelu" (GeGLU, by the tanh approximation). Default "silu".
        bias: whether the two projections have a bias. Default False.
        device, dtype: of the parameters; None is PyTorch's default.

    The forward takes x, (..., m), and returns y in its shape. Each token stands for itself: there is no state.

    Raises:
        ValueError: a wrong argument.

    Shazeer, "GLU Variants Improve Transformer" (2020), section 2.

    Example:
        >>> import torch
        >>> from ssmscan.layers import MLP
        >>> MLP(d_model=8, d_intermediate=16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        activation: Literal["silu", "gelu"] = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("MLP", d_model=d_model, d_intermediate=d_intermediate)
        if activation not in ACTIVATIONS:
            raise ValueError(error("MLP", 'activation must be "silu" or "gelu"', repr(activation)))
        self.activation = activation
        self.fc1 = nn.Linear(d_model, 2 * d_intermediate, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(d_intermediate, d_model, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * ACTIVATIONS[self.activation](gate))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
