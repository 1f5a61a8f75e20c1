"""Text: foretell each character of a file from those before it."""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error
from ssmscan.tasks.task import Batch, Measure, Split, Task, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Text(Task):
    """The characters of one file: each is to be foretold from those before it in a piece of the text.

    The end of the file is held out for evaluation. A batch has pieces that begin anywhere; the vocabulary is every
    character of the file, in the order of its code point.

    Args:
        data: a text file in UTF-8.
        length: of a piece (characters).
        held_out: fraction of the file, at its end, that is for evaluation.
        sha256: of the file; a file of another content is refused. Without it any is taken; a run writes it down.

    Raises:
        TypeError: a length that is not an integer.
        ValueError: a value out of range; at the first use of the text a file that cannot be read, that is not UTF-8,
            has another content than ``sha256`` says, or is too short: both parts must have more than ``length``
            characters.

    Example:
        >>> import tempfile
        >>> from ssmscan.tasks import Text
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("to be or not to be, " * 10), file.flush()
        ...     task = Text(file.name, length=8)
        ...     batch = task.batch(size=1, seed=0, index=0, split="train")
        >>> "".join(task.characters)
        ' ,benort'
        >>> batch.tokens[0, 1:].tolist() == batch.targets[0, :-1].tolist()
        True
    """

    name: ClassVar[str] = "text"
    foretells: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "bits_per_character")

    data: str
    length: int = 256
    held_out: float = 0.1
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_integer(self.name, "length", self.length, 1)
        if not 0 < self.held_out < 1:
            raise ValueError(error(self.name, "held_out must be between 0 and 1", self.held_out))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def example_length(self) -> int:
        return self.length

    @property
    def title(self) -> str:
        return f"characters of {Path(self.data).name}, {self.length} at a time"

    def _read(self) -> bytes:
        try:
            content = Path(self.data).read_bytes()
        except OSError as reason:
            raise ValueError(error(self.name, "data must be a file", f"{self.data}: {reason.strerror}")) from None
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, found):
            advice = "Its content has changed: bring the old one back, or begin a new run."
            raise ValueError(error(self.name, f"data must have the SHA-256 {self.sha256}", found, advice))
        return content

    @cached_property
    def text(self) -> str:
        try:
            text = self._read().decode("utf-8-sig")
        except UnicodeDecodeError as reason:
            got = f"{self.data}, in which byte {reason.start} is not"
            raise ValueError(error(self.name, "data must be UTF-8", got, "Convert it with iconv.")) from None
        parts = self._split(len(text))
        if min(parts) <= self.length:
            rule = f"data must have more than length = {self.length} characters to train on, and to evaluate"
            raise ValueError(error(self.name, rule, f"{parts[0]} and {parts[1]} in {self.data}"))
        return text

    @cached_property
    def characters(self) -> list[str]:
        """The vocabulary: token i is ``characters[i]``."""
        return sorted(set(self.text))

    @cached_property
    def parts(self) -> dict[Split, np.ndarray]:
        """The tokens of what is trained on and of what is held out."""
        points = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        tokens = np.unique_inverse(points).inverse_indices.astype(np.min_scalar_type(self.vocab_size))
        at = self._split(len(tokens))[0]
        return {"train": tokens[:at], "eval": tokens[at:]}

    def _split(self, size: int) -> tuple[int, int]:
        held_out = math.ceil(size * self.held_out)
        return size - held_out, held_out

    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        part = self.parts[split]
        starts = generator(seed, index, split).integers(len(part) - self.length, size=size)
        pieces = torch.from_numpy(part[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return Batch(pieces[:, :-1], pieces[:, 1:])

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, Measure]:
        measures = super().measure(logits, targets)
        nats = measures["loss"]
        return measures | {"bits_per_character": Measure(nats.total / math.log(2), nats.answers)}

    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """The last line or so of the piece, and below each of its characters what the model took to come there."""
        shown = slice(-100, None)
        rows = (("text", targets), ("model", predictions))
        return "\n".join(f"{name:<9} {self._plain(row[shown])}" for name, row in rows)

    def _plain(self, tokens: Tensor) -> str:
        """The characters of ``tokens`` with a space for those that move the cursor."""
        characters = (self.characters[token] for token in tokens.tolist())
        return "".join(character if character.isprintable() else " " for character in characters)

    def pinned(self) -> Self:
        return replace(self, sha256=hashlib.sha256(self._read()).hexdigest())

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Text to tokens and back, as transformers has it."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(self.characters)}, ""))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
