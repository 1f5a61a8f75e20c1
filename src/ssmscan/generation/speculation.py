"""Speculative decoding: a draft proposes a block of tokens, the model checks it in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.generation.sampling import Sampling, seen_tokens
from ssmscan.layers import copy, restore

if TYPE_CHECKING:
    from ssmscan.generation.generator import Generator


def speculate(
    target: Generator,
    draft: Generator,
    input_ids: Tensor,
    scores: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    ends: list[int],
    random: torch.Generator,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Tokens (1,) on the CPU, distributed as those of ``target`` alone; both have read the prompt ``input_ids``,
    0 in ``attention_mask`` at its padding.

    ``scores`` are those of the first new token, (1, v). A block is the last token that neither has read yet, and what
    the draft proposes after it. Where a proposal is refused, both go back to their states before the block and read
    again what was taken of it.
    """
    seen = seen_tokens(sampling, input_ids, attention_mask, scores.shape[-1])
    block = sampling.choose(scores, seen, random)
    yield block.cpu()
    given, both = 1, (target, draft)
    states = [layer.state for one in both for layer in one.cache.layers]
    while given < max_new_tokens and block[-1].item() not in ends:
        count = min(target.proposals, max_new_tokens - given)
        last, saved = block[-1:], copy(states)
        seen = _also(seen, last)
        chances, guesses, proposed = [], seen, last
        for _ in range(count):
            q = sampling.probabilities(draft.advance(proposed[-1:].unsqueeze(0)), guesses)
            token = _draw(q, random)
            chances.append(q[0])
            proposed = torch.cat([proposed, token])
            guesses = _also(guesses, token)
        p = _each(sampling, target.forward(proposed.unsqueeze(0))[0], seen, proposed[1:])
        accepted, following = verify(p, torch.stack(chances), proposed[1:], random)
        block = torch.cat([proposed[1 : accepted + 1], following])
        if accepted < count:
            restore(states, saved)
            for one in both:
                one.forward(proposed[: accepted + 1].unsqueeze(0))
        else:
            draft.advance(proposed[-1:].unsqueeze(0))
        for token in block[: max_new_tokens - given].cpu().split(1):
            yield token
            given += 1
            if token.item() in ends:
                return
        seen = _also(seen, block[:-1])


def verify(p: Tensor, q: Tensor, proposed: Tensor, random: torch.Generator) -> tuple[int, Tensor]:
    """How many of the proposals are taken, and the token that follows them.

    Args:
        p: what the model would draw from at each place of the block, (k+1, v).
        q: what the draft drew the proposals from, (k, v).
        proposed: the proposals, (k,), int64.
        random: the random numbers.

    Proposal t at place i is taken with probability min(1, pᵢ(t) / qᵢ(t)); at the first that is not, the token is drawn
    from max(0, pᵢ − qᵢ), and behind the last from pₖ: so every token is distributed as p says.
    """
    k = len(proposed)
    index = proposed.unsqueeze(1)
    chance = p[:k].gather(1, index) / q.gather(1, index)
    refused = torch.rand(k, generator=random, device=p.device, dtype=p.dtype) >= chance.squeeze(1)
    accepted = int(torch.cat([refused, refused.new_ones(1)]).int().argmax())
    rest = p[accepted] if accepted == k else (p[accepted] - q[accepted]).clamp_(min=0)
    return accepted, _draw(rest.unsqueeze(0), random)


def _draw(p: Tensor, random: torch.Generator) -> Tensor:
    """A token of each row of (b, v), whose sums need not be 1."""
    return (p / torch.empty_like(p).exponential_(generator=random)).argmax(-1)


def _each(sampling: Sampling, scores: Tensor, seen: Tensor | None, proposed: Tensor) -> Tensor:
    """The distributions at each place of a block, (k+1, v), of which ``seen`` knows what was there at the first."""
    rows = []
    for i in range(len(scores)):
        rows.append(sampling.probabilities(scores[i : i + 1], seen)[0])
        seen = _also(seen, proposed[i : i + 1])
    return torch.stack(rows)


def _also(seen: Tensor | None, tokens: Tensor) -> Tensor | None:
    """``seen`` with more tokens, (k,)."""
    return None if seen is None else seen.index_fill(1, tokens, True)
