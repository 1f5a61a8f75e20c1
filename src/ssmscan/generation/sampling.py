"""From the scores of every next token to the one that is taken, without leaving the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its scores.

    Args:
        temperature: the scores are divided by it; 0 takes the greatest each time.
        top_k: draw among so many greatest (tokens); None is all.
        top_p: draw among the likeliest that have this probability together; None is all.
        repetition_penalty: the positive scores of tokens that were there already are divided by it, the negative ones
            multiplied; 1 is none. As Keskar and others, "CTRL" (2019), section 4.1, have it.

    Raises:
        TypeError, ValueError: a value out of range.

    Example:
        >>> import torch
        >>> from ssmscan.generation import Sampling
        >>> scores = torch.tensor([[1.0, 3.0, 2.0]])
        >>> (100 * Sampling(temperature=0.5, top_k=2).probabilities(scores)).round().int().tolist()
        [[0, 88, 12]]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(error("Generator", "temperature must be at least 0 and finite", self.temperature))
        if self.top_k is not None:
            check_integer("Generator", "top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(error("Generator", "top_p must be in (0, 1]", self.top_p))
        if not 0 < self.repetition_penalty < math.inf:
            rule = "repetition_penalty must be positive and finite"
            raise ValueError(error("Generator", rule, self.repetition_penalty))

    def choose(
        self, scores: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"] | None, random: torch.Generator
    ) -> Int[Tensor, " b"]:
        """The next token of each row; ``seen`` marks those that were there already, where a penalty asks for it."""
        scores = self._penalised(scores, seen)
        if self.temperature > 0:
            # The greatest of log p − log E, E exponential, is a draw from p.
            noise = torch.empty_like(scores).exponential_(generator=random)
            scores = self._kept(scores).sub_(noise.log_())
        return scores.argmax(-1)

    def probabilities(
        self, scores: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b v"]:
        """The distribution that :meth:`choose` draws from."""
        scores = self._penalised(scores, seen)
        if self.temperature > 0:
            return self._kept(scores).softmax(-1)
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def _penalised(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        if seen is None:
            return scores
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    def _kept(self, scores: Tensor) -> Tensor:
        """The scores over the temperature, −∞ for what is not drawn from."""
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            chances = ordered.softmax(-1)
            # A token stays while those before it have less than top_p together.
            ordered = ordered.masked_fill(chances.cumsum(-1) - chances >= self.top_p, -math.inf)
            scores = torch.empty_like(scores).scatter_(-1, order, ordered)
        return scores


def seen_tokens(sampling: Sampling, input_ids: Tensor, attention_mask: Tensor | None, v: int) -> Tensor | None:
    """Which tokens are in each prompt, (b, v), padding apart; None where nobody asks."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(input_ids.shape[0], v, dtype=torch.bool, device=input_ids.device)
    if attention_mask is not None:
        # In place of padding, on the left, the last token of the prompt.
        there = attention_mask.to(input_ids.device).bool()
        input_ids = torch.where(there, input_ids, input_ids[:, -1:])
    return seen.scatter_(1, input_ids.long(), True)
