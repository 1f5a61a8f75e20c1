"""The short convolution before a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.context import Context
from ssmscan.layers.mixer import Kept, hide
from ssmscan.layers.state import advance
from ssmscan.ops import causal_conv1d, causal_conv1d_step
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

WIDEST = 8


class ShortConv(nn.Conv1d):
    """A depthwise convolution over a few neighbouring tokens: :func:`ssmscan.causal_conv1d` as a module.

    A :class:`torch.nn.Conv1d` by its parameters, weight (d, 1, w) and bias (d), and their start: both U(±w^-½).

    Args:
        channels: number d of channels.
        width: number w of tokens under the kernel, 2 to 8.
        bias: whether there is a bias.
        activation: "silu" or None.
        centred: y_t meets the tokens from t - w//2 on, and those after it: not causal, and without a state.
        device, dtype: of the parameters.

    The forward takes x, (b, l, d), a state (b, w - 1, d) or None, cu_seqlens and mask, and returns (b, l, d).
    """

    context = Context()

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = True,
        activation: str | None = "silu",
        centred: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(width, int) or not 2 <= width <= WIDEST:
            raise ValueError(error("ShortConv", f"d_conv must be 2 to {WIDEST}", width))
        super().__init__(channels, channels, width, groups=channels, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.centred = centred

    def kept(self, dtype: torch.dtype) -> Kept:
        """The layout of the state: the last w - 1 tokens."""
        return Kept((self.kernel_size[0] - 1, self.out_channels), dtype)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        h: Float[Tensor, "b w-1 d"] | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        # Before and after, for a projection's bias and the convolution's make something of nothing.
        x = hide(x, mask)
        y = self._both_sides(x, cu_seqlens) if self.centred else self._past(x, h, cu_seqlens)
        return hide(y, mask)

    def _past(self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        fixed = {"weight": self.weight.squeeze(1), "bias": self.bias, "activation": self.activation}
        return advance(self.context, causal_conv1d, causal_conv1d_step, h, cu_seqlens, {"x": x}, **fixed)

    def _both_sides(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The past and the present by one causal convolution, what comes after by one from right to left."""
        weight = self.weight.squeeze(1)
        before = weight.shape[1] // 2 + 1
        y, _ = self.context.run(causal_conv1d, x, weight[:, :before], self.bias, cu_seqlens=cu_seqlens)
        if before < weight.shape[1]:
            # From right to left the present comes last, and has been taken.
            after = F.pad(weight[:, before:].flip(1), (0, 1))
            y = y + self.context.run(causal_conv1d, x, after, reverse=True, cu_seqlens=cu_seqlens)[0]
        return F.silu(y) if self.activation == "silu" else y

    def extra_repr(self) -> str:
        return f"{self.out_channels}, width={self.kernel_size[0]}, activation={self.activation}, centred={self.centred}"
