"""A small sequence model of GatedSSM blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ssmscan.layers import Block, GatedSSM, GatedSSMState, RMSNorm
from ssmscan.models.config import LanguageModelConfig
from ssmscan.shapes import INDEX, check_rank, error

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LanguageModelState = tuple[GatedSSMState, ...]


class LanguageModel(nn.Module):
    """Embedding, GatedSSM blocks, norm, head: scores of every next token from the tokens so far.

    Args:
        vocab_size: number v of tokens.
        config: the model's shape. Default :class:`LanguageModelConfig`'s defaults.

    The forward takes

    - tokens: (b, l), int32 or int64, in 0 … v-1;
    - state: None, or what :meth:`init_state` made; read first and updated in place, as by every layer;
    - cu_seqlens: bounds of packed sequences, as in :func:`ssmscan.linear_scan`;

    and returns logits, (b, l, v).

    Raises:
        TypeError: tokens are not int32 or int64.
        ValueError: a wrong shape.

    Example:
        >>> import torch
        >>> from ssmscan.models import LanguageModel
        >>> model = LanguageModel(vocab_size=18)
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 18])
    """

    def __init__(self, vocab_size: int, config: LanguageModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LanguageModelConfig()
        memory = (config.shortest_memory, config.longest_memory)
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(GatedSSM(config.hidden_size, config.state_size_mult, memory), RMSNorm(config.hidden_size, config.eps))
            for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def init_state(self, batch_size: int) -> LanguageModelState:
        """The state before the first token, one for each block."""
        return tuple(block.init_state(batch_size) for block in self.blocks)  # type: ignore[operator]

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        state: LanguageModelState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        if not isinstance(tokens, Tensor) or tokens.dtype not in INDEX:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(error("LanguageModel", "tokens must be an int32 or int64 tensor", got))
        check_rank("LanguageModel", "tokens", tokens, "b, l")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                error("LanguageModel", f"state must have one entry for each of {len(self.blocks)} blocks", len(state))
            )
        x = self.embedding(tokens)
        states = [None] * len(self.blocks) if state is None else state
        for block, block_state in zip(self.blocks, states, strict=True):
            x = block(x, block_state, cu_seqlens)
        return self.head(self.norm(x))
