"""Copying: memorise, wait, reproduce."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error
from ssmscan.tasks.rendering import LETTERS, show_recall
from ssmscan.tasks.task import IGNORE, Batch, Split, Task, check_shortest, draw_length, generator


@dataclass(frozen=True)
class Copying(Task):
    """Data tokens, a wait of noise tokens, then markers at which the data must be reproduced in order.

    Tokens 0 … symbols-1 are data, ``symbols`` is noise, ``symbols + 1`` the marker. An example is ``length`` tokens
    followed by ``data_tokens`` markers; at the i-th marker the answer is the i-th data token. The answer is never
    fed back: the model has to keep its place by itself.

    Args:
        symbols: number of data symbols, 1 to 62 (a letter or digit each when rendered).
        data_tokens: how many an example holds (tokens).
        length: what comes before the first marker (tokens).
        shortest: where given, a training batch has one of the lengths ``length``, ``length // 2``, ``length // 4``, …
            that are not below it (tokens). What the short ones teach early, the long ones then extend.

    Raises:
        TypeError: an argument that is not an integer.
        ValueError: symbols outside 1 … 62, data_tokens outside 1 … length, or shortest outside data_tokens … length.

    The task is that of Arjovsky, Shah and Bengio, "Unitary Evolution Recurrent Neural Networks" (2016), section 5.1.

    Example:
        >>> from ssmscan.tasks import Copying
        >>> batch = Copying(symbols=4, data_tokens=2, length=5).batch(size=1, seed=0, index=0, split="train")
        >>> batch.tokens[0, 2:].tolist(), batch.targets[0, :5].tolist()
        ([4, 4, 4, 5, 5], [-100, -100, -100, -100, -100])
    """

    name: ClassVar[str] = "copying"

    symbols: int = 16
    data_tokens: int = 8
    length: int = 64
    shortest: int | None = None

    def __post_init__(self) -> None:
        for field in ("symbols", "data_tokens", "length"):
            check_integer(self.name, field, getattr(self, field), 1)
        if self.symbols > len(LETTERS):
            raise ValueError(error(self.name, f"symbols must be 1 to {len(LETTERS)}", self.symbols))
        if self.data_tokens > self.length:
            raise ValueError(error(self.name, f"data_tokens must be 1 to length = {self.length}", self.data_tokens))
        check_shortest(self.name, self.shortest, self.data_tokens, self.length)

    @property
    def noise(self) -> int:
        return self.symbols

    @property
    def marker(self) -> int:
        return self.symbols + 1

    @property
    def title(self) -> str:
        task = self.name.replace("_", " ")
        return f"{task}: {self.data_tokens} data tokens of {self.symbols} symbols in {self.length}"

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def example_length(self) -> int:
        return self.length + self.data_tokens

    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        random = generator(seed, index, split)
        length = draw_length(random, self.length, self.shortest if split == "train" else None)
        data = random.integers(self.symbols, size=(size, self.data_tokens))
        tokens = np.full((size, length + self.data_tokens), self.noise)
        np.put_along_axis(tokens, self._positions(random, size, length), data, 1)
        tokens[:, length:] = self.marker
        targets = np.full_like(tokens, IGNORE)
        targets[:, length:] = data
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _positions(self, random: np.random.Generator, size: int, length: int) -> np.ndarray:
        """Where the data tokens stand, (size, data_tokens), increasing along each row."""
        return np.tile(np.arange(self.data_tokens), (size, 1))

    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """The sequence with noise as dots, the answer, the model's answer, and how many symbols of it are right."""
        sequence = tokens[targets == IGNORE].tolist()
        return show_recall("".join(map(self._letter, sequence)), targets, predictions, self._letter)

    def _letter(self, token: int) -> str:
        return {self.noise: ".", self.marker: "?"}.get(token) or LETTERS[token]
