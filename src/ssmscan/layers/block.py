"""Block: norm, mixer and residual, and an MLP with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmscan.layers.mixer import Mixer
from ssmscan.layers.state import Held
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Block(nn.Module):
    """A residual block: what a layer of a model is.

    .. math:: x' = x + \\mathrm{mixer}(\\mathrm{norm}(x)), \\qquad y = x' + \\mathrm{mlp}(\\mathrm{norm}_2(x'))

    and y = x' without an MLP.

    Args:
        mixer: a layer of :mod:`ssmscan.layers`, or a module with the same forward.
        norm: such as :class:`ssmscan.layers.RMSNorm`.
        mlp: a module of one argument, or None.
        norm2: the norm before the MLP; given exactly if that is.
        residual_in_fp32: keep the residual stream in float32 (float64 for float64), whatever the layers compute in.
            Default False.

    The forward takes what the mixer takes, and returns y, (b, l, m), in the dtype of the residual stream.
    :meth:`init_state` is the mixer's.

    Raises:
        ValueError: one of mlp and norm2 without the other.

    Example:
        >>> import torch
        >>> from ssmscan.layers import MLP, Block, Mamba, RMSNorm
        >>> block = Block(Mamba(8), RMSNorm(8), MLP(8, 16), RMSNorm(8))
        >>> block(torch.randn(2, 5, 8), block.init_state(2)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: nn.Module,
        mlp: nn.Module | None = None,
        norm2: nn.Module | None = None,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        if (mlp is None) != (norm2 is None):
            given = "mlp alone" if norm2 is None else "norm2 alone"
            raise ValueError(error("Block", "mlp and norm2 must be given together", given))
        self.norm = norm
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.residual_in_fp32 = residual_in_fp32

    def init_state(self, batch_size: int, max_length: int | None = None) -> Any:
        """The mixer's state before the first token."""
        return self.mixer.init_state(batch_size, max_length)

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: Any = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        if isinstance(state, Held):
            state = state.state
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x + self.mixer(self.norm(x), state, cu_seqlens, mask)
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(self.norm2(x))
        return x
