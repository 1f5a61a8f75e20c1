"""Associative recall: read pairs of a key and a value, then tell the value of each key that comes again."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error
from ssmscan.tasks.rendering import show_recall
from ssmscan.tasks.task import IGNORE, Batch, Split, Task, generator


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Pairs of a key and its value, then noise tokens among which each key stands once more.

    Tokens 0 … key_symbols-1 are keys, the next ``value_symbols`` ones values, and the last token is noise. The keys of
    an example differ, its values need not. Where a key stands again the answer is its value, which is never fed back.
    The places of these queries are drawn one after the other from those that are free, the g-th behind the pairs with a
    probability in proportion to g^(power - 1); which key stands at which is random.

    Args:
        pairs: of a key and a value in an example, 1 to key_symbols.
        key_symbols: number of keys.
        value_symbols: number of values.
        length: of an example, at least 3 · pairs (tokens).
        power: in (0, 1]: 1 is uniform places, and the smaller it is, the more of the queries come early.

    Raises:
        TypeError: an argument but power that is not an integer.
        ValueError: an argument out of range.

    The task is the multi-query associative recall of Arora et al., "Zoology: Measuring and Improving Recall in
    Efficient Language Models" (2023), whose queries are placed by such a power too.

    Example:
        >>> from ssmscan.tasks import AssociativeRecall
        >>> task = AssociativeRecall(pairs=2, key_symbols=3, value_symbols=3, length=8)
        >>> batch = task.batch(size=1, seed=0, index=0, split="train")
        >>> batch.tokens[0].tolist()
        [0, 3, 2, 4, 0, 6, 2, 6]
        >>> batch.targets[0].tolist()
        [-100, -100, -100, -100, 3, -100, 4, -100]
    """

    name: ClassVar[str] = "associative_recall"

    pairs: int = 8
    key_symbols: int = 64
    value_symbols: int = 64
    length: int = 64
    power: float = 0.01

    def __post_init__(self) -> None:
        for field in ("pairs", "key_symbols", "value_symbols", "length"):
            check_integer(self.name, field, getattr(self, field), 1)
        if self.pairs > self.key_symbols:
            raise ValueError(error(self.name, f"pairs must be 1 to key_symbols = {self.key_symbols}", self.pairs))
        if self.length < 3 * self.pairs:
            raise ValueError(error(self.name, f"length must be at least 3 · pairs = {3 * self.pairs}", self.length))
        if not 0 < self.power <= 1:
            raise ValueError(error(self.name, "power must be in (0, 1]", self.power))

    @property
    def noise(self) -> int:
        return self.key_symbols + self.value_symbols

    @property
    def title(self) -> str:
        return f"associative recall: {self.pairs} pairs of {self.key_symbols} keys in {self.length}"

    @property
    def vocab_size(self) -> int:
        return self.key_symbols + self.value_symbols + 1

    @property
    def example_length(self) -> int:
        return self.length

    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        random = generator(seed, index, split)
        keys = np.stack([random.choice(self.key_symbols, self.pairs, replace=False) for _ in range(size)])
        values = self.key_symbols + random.integers(self.value_symbols, size=keys.shape)
        places = self._places(random, size)
        tokens = np.full((size, self.length), self.noise)
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        np.put_along_axis(tokens, places, keys, 1)
        targets = np.full_like(tokens, IGNORE)
        np.put_along_axis(targets, places, values, 1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _places(self, random: np.random.Generator, size: int) -> np.ndarray:
        """Where the queries of each key stand, (size, pairs)."""
        free = self.length - 2 * self.pairs
        # The smallest of exponential times, each with its rate, are draws without replacement.
        times = random.exponential(size=(size, free)) * np.arange(1, free + 1) ** (1 - self.power)
        first = np.argpartition(times, self.pairs - 1)[:, : self.pairs]
        return 2 * self.pairs + random.permuted(first, axis=1)

    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """The pairs and the queries with noise as dots, the answers, and the model's answers."""
        words = [self._word(token) for token in tokens.tolist()]
        pairs = [f"{words[at]}={words[at + 1]}" for at in range(0, 2 * self.pairs, 2)]
        rest = "".join(word if word == "." else f" {word} " for word in words[2 * self.pairs :]).split()
        return show_recall(" ".join(pairs + rest), targets, predictions, self._word)

    def _word(self, token: int) -> str:
        if token == self.noise:
            return "."
        return f"k{token}" if token < self.key_symbols else f"v{token - self.key_symbols}"
