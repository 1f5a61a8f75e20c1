"""Text: foretell each token from those before it."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ssmscan.shapes import check_integer, error
from ssmscan.tasks.task import IGNORE, Batch, Measure, Split, Task, measure
from ssmscan.tasks.text import windows
from ssmscan.tasks.text.documents import SEPARATOR, find, kind
from ssmscan.tasks.text.shards import FORMAT, INDEX, Corpus, Part, digest
from ssmscan.tasks.text.tokenization import tokenize
from ssmscan.tasks.text.vocabulary import identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text(Task):
    """The tokens of a text: each is to be foretold from those before it in its document.

    An example is a window of the stream of tokens, in which an end-of-text token stands behind each document. Training
    takes all windows in random order, cut elsewhere in each epoch; evaluation takes them in order. Files become tokens
    once, which are kept in the folder that the environment's ``SSMSCAN_CACHE`` names, by default ``~/.cache/ssmscan``.

    Args:
        data: files of text (.txt, .jsonl, .parquet, and compressed as .xz, .gz, .zst), folders of them, globs, one or a
            list; or the folder that ``ssmscan tokenize`` wrote.
        length: of an example (tokens).
        vocabulary: the tokenizer: bytes, characters, a JSON file of the library tokenizers, or a folder or name that
            transformers knows; null is characters, and for a folder of tokens its own.
        valid: files to evaluate on; null is the end of data.
        held_out: fraction of the tokens, at their end, that is for evaluation where valid names no file. A folder of
            tokens has been divided already.
        separator: a line of a .txt file that stands between two documents; null is that each file is one document.
        packing: documents is that nothing passes from one document to the next, neither a state nor what is foretold;
            concatenate takes the stream as one text, whose batches all have one shape.
        verify: compare the checksum of each file of tokens at every start, a second for each gigabyte; their sizes are
            compared in any case.
        sha256: of the data and the tokenizer; others are refused. Without it any are taken; a run writes it down.

    Raises:
        TypeError: a length that is not an integer.
        ValueError: a value out of range; at the first use of the text, what is wrong with a file or the tokenizer,
            another content than ``sha256`` says, or too little: both parts must have more than ``length`` tokens.

    Example:
        >>> import tempfile
        >>> from ssmscan.tasks import Text
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("to be or not to be, " * 10), file.flush()
        ...     task = Text(file.name, length=8)
        ...     batch = task.batch(size=1, seed=0, index=0, split="train")
        >>> task.vocab_size, len(task.tokenizer().decode(batch.tokens[0]))
        (9, 8)
        >>> batch.tokens[0, 1:].tolist() == batch.targets[0, :-1].tolist()
        True
    """

    name: ClassVar[str] = "text"
    foretells: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "bits_per_byte")

    data: str | list[str]
    length: int = 256
    vocabulary: str | None = None
    valid: str | list[str] | None = None
    held_out: float = 0.1
    separator: str | None = SEPARATOR
    packing: Literal["documents", "concatenate"] = "documents"
    verify: bool = True
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_integer(self.name, "length", self.length, 1)
        if not 0 < self.held_out < 1:
            raise ValueError(error(self.name, "held_out must be between 0 and 1", self.held_out))
        if self.packing not in ("documents", "concatenate"):
            raise ValueError(error(self.name, "packing must be documents or concatenate", self.packing))

    @property
    def vocab_size(self) -> int:
        return self.corpus.index.vocab_size

    @property
    def example_length(self) -> int:
        return self.length

    @property
    def title(self) -> str:
        first, *others = [self.data] if isinstance(self.data, str) else self.data
        return f"text of {Path(first).name}{' …' if others else ''}, {self.length} tokens at a time"

    @cached_property
    def corpus(self) -> Corpus:
        """The tokens, on the disk."""
        corpus = self._given() if self._is_tokens else self._made()
        sizes = {name: len(corpus.parts.get(name, ())) for name in ("train", "eval")}
        if min(sizes.values()) <= self.length:
            rule = f"data must have more than length = {self.length} tokens to train on, and to evaluate"
            raise ValueError(error(self.name, rule, f"{sizes['train']} and {sizes['eval']} in {self.data}"))
        return corpus

    @property
    def _is_tokens(self) -> bool:
        return isinstance(self.data, str) and (Path(self.data) / INDEX).is_file()

    def _given(self) -> Corpus:
        for name in ("vocabulary", "valid"):
            if getattr(self, name) is not None:
                rule = f"{name} must be null where data is a folder of tokens, which has its own"
                advice = f"Give --task.{name} null."
                raise ValueError(error(self.name, rule, getattr(self, name), advice))
        self._check_same()
        return Corpus(Path(str(self.data)), self.verify)

    def _made(self) -> Corpus:
        """The tokens of the files, made unless they have been before."""
        from filelock import FileLock

        self._check_same()
        folder = cache_folder() / self._content
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes one makes them, and the others wait.
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                tokenize(folder, self._files, self._vocabulary, self.separator, self.held_out)
        return Corpus(folder, self.verify)

    def _check_same(self) -> None:
        if self.sha256 not in (None, self._content):
            advice = "Its content has changed, or its tokenizer: bring the old one back, or begin a new run."
            raise ValueError(error(self.name, f"data must have the SHA-256 {self.sha256}", self._content, advice))

    @cached_property
    def _content(self) -> str:
        """The SHA-256 of all that the tokens depend on."""
        if self._is_tokens:
            return digest(Path(str(self.data)) / INDEX)
        files = {part: [(kind(path), digest(path)) for path in paths] for part, paths in self._files.items()}
        parts = [FORMAT, files, identity(self._vocabulary), self.separator, None if self.valid else self.held_out]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        valid = {} if self.valid is None else {"eval": find("valid", self.valid)}
        return {"train": find("data", self.data), **valid}

    @property
    def _vocabulary(self) -> str:
        return self.vocabulary or "characters"

    @property
    def held_out_examples(self) -> int:
        return windows.whole(len(self.corpus.parts["eval"]), self.length)

    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        part = self.corpus.parts[split]
        if split == "train":
            places = windows.shuffled(len(part), self.length, seed, index * size, size)
        else:
            places = windows.in_order(len(part), self.length, index * size, size)
        return rows(self.corpus, part, places, self.length, self.packing == "documents")

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, Measure]:
        """Also ``bits_per_byte`` of the text that the targets are; the end of a document costs bits, and is no text."""
        return measure_text(self.corpus, logits, targets)

    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """The last line or so of the window, and below it what the model took to come in place of each token."""
        asked = targets != IGNORE
        rows = (("text", targets[asked]), ("model", predictions[asked]))
        return "\n".join(f"{name:<9} {self._plain(row[-100:])[-100:]}" for name, row in rows)

    def _plain(self, tokens: Tensor) -> str:
        """The text of ``tokens`` with a space for what moves the cursor."""
        text = self.tokenizer().decode(tokens.tolist())
        return "".join(character if character.isprintable() else " " for character in text)

    def pinned(self) -> Self:
        pinned = replace(self, sha256=self._content)
        # What has been checked need not be once more.
        vars(pinned)["corpus"] = self.corpus
        return pinned

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Text to tokens and back, as transformers has it."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.corpus.folder)


def rows(corpus: Corpus, part: Part, places: np.ndarray, length: int, documents: bool) -> Batch:
    """Examples of ``length`` tokens from each of ``places`` (b,) of a part on; ``documents`` keeps these apart."""
    stream = part.read(places, length + 1)
    if stream.max(initial=0) >= corpus.index.vocab_size:
        rule = f"tokens must be 0 to {corpus.index.vocab_size - 1}"
        advice = "A file of the folder is not that of its index."
        raise ValueError(error("text", rule, f"{stream.max()} in {corpus.folder}", advice))
    # A part begins anew behind its end, and in each row at the column of its first token.
    begins = (places[:, None] + np.arange(length + 1)) % len(part) == 0
    if documents:
        begins[:, 1:] |= stream[:, :-1] == corpus.index.end_of_text
    begins[:, 0] = False
    tokens, targets = stream[:, :-1].copy(), np.where(begins[:, 1:], IGNORE, stream[:, 1:])
    starts = torch.from_numpy(begins[:, :-1]) if documents and begins[:, :-1].any() else None
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), starts)


def measure_text(corpus: Corpus, logits: Tensor, targets: Tensor) -> dict[str, Measure]:
    """``loss``, ``accuracy`` and ``bits_per_byte`` of logits (b, l, v) by targets (b, l)."""
    measures = measure(logits, targets)
    lengths = torch.from_numpy(corpus.token_bytes).to(targets.device)
    written = torch.where(targets == IGNORE, 0, lengths[targets.clamp(min=0)]).sum()
    return measures | {"bits_per_byte": Measure(measures["loss"].total / math.log(2), written)}


def cache_folder() -> Path:
    """Where tokens are kept."""
    given = os.environ.get("SSMSCAN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssmscan"
