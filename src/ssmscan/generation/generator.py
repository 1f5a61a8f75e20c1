"""Generator: a model, its states at fixed addresses, and the graph of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmscan.ahead import Late, Recorded
from ssmscan.generation.sampling import Sampling, seen_tokens
from ssmscan.generation.speculation import speculate
from ssmscan.shapes import INDEX, check_integer, error

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from ssmscan.models import SSMForCausalLM


class Generator:
    """Continues token sequences by a model, faster than its ``generate``, with the same tokens where they are greatest.

    The states stay at fixed addresses; on CUDA a step is recorded as a graph once for the batch size. The host never
    waits for a token before it asks for the next: it reads them a step or two later.

    Args:
        model: what scores the next token.
        batch_size: sequences at a time.
        max_length: of a sequence, prompt and continuation (tokens), which attention has room for at first; a longer
            call makes more, and a new graph. Other layers take no note of it.
        draft: a smaller model of the same vocabulary that proposes tokens, which ``model`` then checks in one forward:
            the same distribution, as Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
            Decoding" (2023), show; for one sequence.
        proposals: how many tokens the draft proposes at a time.

    Raises:
        ValueError: a size below 1, or a draft of another vocabulary or for several sequences.
        NotImplementedError: a model with layers that see the future.

    Example:
        >>> import torch
        >>> from ssmscan.generation import Generator
        >>> from ssmscan.models import SSMConfig, SSMForCausalLM
        >>> model = SSMForCausalLM(SSMConfig(vocab_size=11, hidden_size=8, mixers=["gated_ssm"]))
        >>> generator = Generator(model.eval())
        >>> generator(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape
        torch.Size([1, 7])
        >>> [token.shape for token in generator.stream(torch.tensor([[1, 2, 3]]), max_new_tokens=2, temperature=0.8)]
        [torch.Size([1]), torch.Size([1])]
    """

    def __init__(
        self,
        model: SSMForCausalLM,
        batch_size: int = 1,
        max_length: int | None = None,
        draft: SSMForCausalLM | None = None,
        proposals: int = 4,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("proposals", proposals)):
            check_integer("Generator", name, 1 if value is None else value, 1)
        self.model, self.batch_size, self.proposals = model, batch_size, proposals
        self.cache = model.make_cache(batch_size, max_length)
        self.draft = None if draft is None else self._drafting(draft, max_length)
        self._record()

    def _drafting(self, draft: SSMForCausalLM, max_length: int | None) -> Generator:
        if self.batch_size != 1:
            raise ValueError(error("Generator", "batch_size must be 1 with a draft", self.batch_size))
        sizes = draft.config.vocab_size, self.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(error("Generator", f"draft must have the vocabulary of model, {sizes[1]}", sizes[0]))
        return Generator(draft, 1, max_length)

    def _record(self) -> None:
        self._step = Recorded(self.forward, self.model.device) if self.model.device.type == "cuda" else self.forward

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Int[Tensor, "b l"],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Bool[Tensor, "b l"] | None = None,
        seed: int | None = None,
    ) -> Int[Tensor, "b total"]:
        """The prompts with their continuations.

        Args:
            input_ids: prompts of one length, (b, l), int32 or int64; shorter ones are padded on the left.
            max_new_tokens: at most so many more (tokens).
            temperature, top_k, top_p, repetition_penalty: as :class:`Sampling` has them; by default the greatest score
                wins.
            eos_token_id: what ends a sequence, one token or several; it is filled up with the first of them.
            attention_mask: (b, l), 0 at padding.
            seed: of the drawing; None draws other tokens each time.

        Returns:
            (b, l + new): up to the end of the longest sequence, or max_new_tokens.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or value.
        """
        new = self.stream(
            input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_token_id, attention_mask, seed
        )
        tokens = [token.unsqueeze(1) for token in new]
        return torch.cat([input_ids, *(token.to(input_ids) for token in tokens)], 1)

    def stream(
        self,
        input_ids: Int[Tensor, "b l"],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Bool[Tensor, "b l"] | None = None,
        seed: int | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """The continuations token by token, each (b,), int64, on the CPU; the arguments are those of a call.

        One stream at a time: another call begins anew, and the stream before it then raises a RuntimeError.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        self._check(input_ids, attention_mask)
        check_integer("Generator", "max_new_tokens", max_new_tokens, 1)
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        return self._alone(self._stream(input_ids, max_new_tokens, sampling, ends, attention_mask, seed))

    def _alone(self, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        """The tokens of a stream, as long as no other has taken the states."""
        self._turn = turn = object()
        for token in tokens:
            yield token
            if self._turn is not turn:
                rule = "a stream must not go on after another call of its Generator"
                raise RuntimeError(error("Generator", rule, "both", "Make a Generator for each."))

    @torch.no_grad()
    def _stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        ends: list[int],
        attention_mask: Tensor | None,
        seed: int | None,
    ) -> Iterator[Tensor]:
        random = torch.Generator(self.model.device)
        random.seed() if seed is None else random.manual_seed(seed)
        input_ids = input_ids.to(self.model.device)
        # Speculation looks some tokens ahead.
        room = input_ids.shape[1] + max_new_tokens + self.proposals
        scores = self.read(input_ids, attention_mask, room)
        if self.draft is not None:
            self.draft.read(input_ids, attention_mask, room)
            yield from speculate(
                self, self.draft, input_ids, scores, max_new_tokens, sampling, ends, random, attention_mask
            )
            return
        seen = seen_tokens(sampling, input_ids, attention_mask, scores.shape[-1])
        final = torch.tensor(ends, device=self.model.device, dtype=torch.int64)
        done = torch.zeros(self.batch_size, dtype=torch.bool, device=self.model.device)
        late = Late()
        for i in range(max_new_tokens):
            token = sampling.choose(scores, seen, random)
            if ends:
                token = torch.where(done, final[0], token)
                done = done | torch.isin(token, final)
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            late.put(i, torch.cat([token, done.all().unsqueeze(0)]))
            for _, row in late.take(everything=i == max_new_tokens - 1):
                yield row[:-1]
                if row[-1]:
                    return
            if i < max_new_tokens - 1:
                scores = self.advance(token.unsqueeze(1))

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.dtype not in INDEX:
            raise TypeError(error("Generator", "input_ids must be int32 or int64", input_ids.dtype))
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size or input_ids.shape[1] == 0:
            rule = f"input_ids must have shape (b, l) with b = {self.batch_size} and l of at least 1"
            raise ValueError(error("Generator", rule, tuple(input_ids.shape)))
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            rule = f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}"
            raise ValueError(error("Generator", rule, tuple(attention_mask.shape)))
        if attention_mask is not None and not attention_mask[:, -1].all():
            rule = "attention_mask must be 1 at the last token of each row"
            raise ValueError(error("Generator", rule, "0", "Pad on the left."))

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, room: int) -> Tensor:
        """Forget what was before, read the prompts, and return the scores of the next token, (b, v)."""
        self.cache.reset()
        states = [layer.state for layer in self.cache.layers]
        self.cache.make_room(room)
        if any(layer.state is not state for layer, state in zip(self.cache.layers, states, strict=True)):
            self._record()
        mask = None if attention_mask is None else attention_mask.to(self.model.device)
        return self.model(input_ids, attention_mask=mask, cache=self.cache, logits_to_keep=1).logits[:, -1]

    def advance(self, tokens: Tensor) -> Tensor:
        """Read one more token of each sequence, (b, 1), and return the scores of the next, (b, v)."""
        return self._step(tokens)[:, -1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Read more tokens, (b, l), and return the scores after each of them, (b, l, v)."""
        # A graph counts no tokens; there is room for all.
        for layer in self.cache.layers:
            layer.length = 0
        return self.model(tokens, cache=self.cache).logits
