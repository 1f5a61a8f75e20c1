"""Induction heads: say again what followed the special token the last time, however long ago."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error
from ssmscan.tasks.rendering import LETTERS, show_recall
from ssmscan.tasks.task import IGNORE, Batch, Measure, Split, Task, check_shortest, draw_length, generator

if TYPE_CHECKING:
    from ssmscan.models import SSMForCausalLM

# The first special token, the symbol behind it, the last token.
_SHORTEST = 3
# Batches from here on are those of examinations, by their length; no evaluation reaches them.
_EXAMINATIONS = 2**63
# Tokens that a model reads at a time in an examination.
_AT_A_TIME = 2**15


@dataclass(frozen=True)
class InductionHeads(Task):
    """Random symbols in which a special token stands twice, at a random place and at the end.

    Tokens 0 … symbols-1 are symbols, ``symbols`` is the special token. Any place but the last two can be its first, all
    equally likely; the answer, at the last token, is the symbol that followed it there.

    The examination asks the same of longer sequences than the training had. The model reads them piece by piece and
    carries its state, so their length costs time and, but for attention, no memory.

    Args:
        symbols: number of symbols, 1 to 62 (a letter or digit each when rendered).
        length: of an example, at least 3 (tokens).
        shortest: at least 3 (tokens); where given, the examples of a training batch all have one of the lengths
            ``length``, ``length // 2``, ``length // 4``, … that are not below it. What the short ones teach early, the
            long ones then extend.
        test_lengths: of examples in the examination, at least 3 each (tokens); () is no examination.
        test_examples: of each such length (examples).

    Raises:
        TypeError: an argument that is not an integer, or test_lengths that are not a tuple of integers.
        ValueError: an argument out of range.

    The task is that of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section
    4.1.2.

    Example:
        >>> from ssmscan.tasks import InductionHeads
        >>> batch = InductionHeads(symbols=4, length=8).batch(size=1, seed=0, index=1, split="train")
        >>> batch.tokens[0].tolist(), batch.targets[0, -1].tolist()
        ([0, 2, 3, 0, 4, 1, 3, 4], 1)
    """

    name: ClassVar[str] = "induction_heads"

    symbols: int = 16
    length: int = 256
    shortest: int | None = None
    test_lengths: tuple[int, ...] = (2**6, 2**8, 2**10, 2**12, 2**14, 2**16)
    test_examples: int = 32

    def __post_init__(self) -> None:
        check_integer(self.name, "symbols", self.symbols, 1)
        if self.symbols > len(LETTERS):
            raise ValueError(error(self.name, f"symbols must be 1 to {len(LETTERS)}", self.symbols))
        check_integer(self.name, "length", self.length, _SHORTEST)
        check_shortest(self.name, self.shortest, _SHORTEST, self.length)
        if not isinstance(self.test_lengths, tuple):
            raise TypeError(error(self.name, "test_lengths must be a tuple of integers", repr(self.test_lengths)))
        for length in self.test_lengths:
            check_integer(self.name, "test_lengths", length, _SHORTEST)
        check_integer(self.name, "test_examples", self.test_examples, 1)

    @property
    def special(self) -> int:
        return self.symbols

    @property
    def title(self) -> str:
        return f"induction heads: {self.symbols} symbols in {self.length}"

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def example_length(self) -> int:
        return self.length

    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        random = generator(seed, index, split)
        length = draw_length(random, self.length, self.shortest if split == "train" else None)
        examples = _Examples(self, random, size, length)
        tokens = examples.read(length)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = examples.answers
        return Batch(tokens, targets)

    @torch.no_grad()
    def examine(self, model: SSMForCausalLM, seed: int) -> dict[str, Measure]:
        """``accuracy_at_…`` for each of ``test_lengths``; nothing, with a warning, of a model that has no state."""
        model.eval()
        try:
            return {f"accuracy_at_{length}": self._accuracy(model, seed, length) for length in self.test_lengths}
        except NotImplementedError as reason:
            warnings.warn(f"{self.name}: no examination. {reason}", stacklevel=2)
            return {}

    def _accuracy(self, model: SSMForCausalLM, seed: int, length: int) -> Measure:
        cache = model.make_cache(self.test_examples, length)
        examples = _Examples(self, generator(seed, _EXAMINATIONS + length, "eval"), self.test_examples, length)
        piece = max(1, _AT_A_TIME // self.test_examples)
        for first in range(0, length, piece):
            tokens = examples.read(min(piece, length - first)).to(model.device)
            last = model(tokens, cache=cache, logits_to_keep=1).logits[:, -1]
        return Measure((last.argmax(-1).cpu() == examples.answers).sum(), torch.tensor(self.test_examples))

    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """The sequence with the special token as a question mark, the answer, and the model's answer."""
        return show_recall("".join(map(self._letter, tokens.tolist())), targets, predictions, self._letter)

    def _letter(self, token: int) -> str:
        return "?" if token == self.special else LETTERS[token]


class _Examples:
    """``size`` sequences of ``length``, drawn as they are read; ``answers``, (size,)."""

    def __init__(self, task: InductionHeads, random: np.random.Generator, size: int, length: int) -> None:
        self._task, self._random, self._length = task, random, length
        self._places = random.integers(length - 2, size=size)
        self._drawn = 0
        self._answers = random.integers(task.symbols, size=size)

    @property
    def answers(self) -> Tensor:
        return torch.from_numpy(self._answers)

    def read(self, count: int) -> Tensor:
        """The next ``count`` tokens of each, (size, count)."""
        tokens = self._random.integers(self._task.symbols, size=(len(self._places), count))
        place = np.arange(self._drawn, self._drawn + count)
        distance = place - self._places[:, None]
        tokens = np.where(distance == 1, self._answers[:, None], tokens)
        tokens[(distance == 0) | (place == self._length - 1)] = self._task.special
        self._drawn += count
        return torch.from_numpy(tokens)
