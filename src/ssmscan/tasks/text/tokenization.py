"""From files to a folder of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ssmscan.shapes import error
from ssmscan.tasks.text import vocabulary as vocabularies
from ssmscan.tasks.text.documents import SEPARATOR, Piece, read
from ssmscan.tasks.text.shards import writing
from ssmscan.tasks.text.vocabulary import Vocabulary

# So much text is encoded at a time (characters).
_BATCH = 2**22
# A BPE is learnt from so much text at most, each file's beginning in proportion to its size (characters).
_SAMPLE = 2**28


def tokenize(
    out: Path,
    files: dict[str, list[Path]],
    tokenizer: str | int,
    separator: str | None = SEPARATOR,
    held_out: float = 0.1,
) -> None:
    """Write a folder of tokens, with a progress bar on a terminal.

    Files are read and tokens written as they come, whatever their size. What a BPE is learnt from is bounded too: 268
    million characters of the training part, the beginning of each file in proportion to its size.

    Args:
        out: the new folder; it is there when whole, or not at all.
        files: of each part, ``train`` at least, as :func:`ssmscan.tasks.text.documents.find` finds them.
        tokenizer: how many tokens of a byte-level BPE to learn, or a tokenizer: ``bytes``, ``characters``, a JSON file
            of the library tokenizers, a folder or name that transformers knows.
        separator: the line between two documents of a plain text; None is that each file is one document.
        held_out: fraction of the training tokens, at their end, that becomes the part ``eval`` where none is given.

    Raises:
        TypeError: a number of tokens that is not an integer.
        ValueError: what a file or tokenizer is refused for, or a held_out that is not between 0 and 1.
        OSError: the folder cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> from ssmscan.tasks.text import Corpus, find, tokenize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "verse.txt").write_text("to be or not to be\\n" * 9)
        ...     tokenize(pathlib.Path(folder, "out"), {"train": find("data", f"{folder}/*.txt")}, tokenizer="bytes")
        ...     corpus = Corpus(pathlib.Path(folder, "out"))
        ...     corpus.index.dtype, corpus.index.parts
        ('<u2', {'train': [0, 154], 'eval': [154, 172]})
    """
    if not 0 < held_out < 1:
        raise ValueError(error("text", "held_out must be between 0 and 1", held_out))
    with _watched(separator) as pieces:
        vocabulary = _vocabulary(tokenizer, files, pieces)
        with writing(out, vocabulary) as writer:
            parts = {}
            for part, paths in files.items():
                first = writer.tokens
                for batch in _batches(pieces(f"tokens of {part}", paths)):
                    writer.write(_encoded(batch, vocabulary))
                parts[part] = (first, writer.tokens)
            if "eval" not in parts:
                first, end = parts["train"]
                cut = end - math.ceil(held_out * (end - first))
                parts |= {"train": (first, cut), "eval": (cut, end)}
            writer.finish(parts)


Pieces = Callable[..., Iterator[Piece]]


@contextmanager
def _watched(separator: str | None) -> Iterator[Pieces]:
    """The documents of files, read under a progress bar: ``pieces(label, paths, at_most)``."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def pieces(label: str, paths: list[Path], at_most: float = math.inf) -> Iterator[Piece]:
            sizes = [path.stat().st_size for path in paths]
            task = bar.add_task(label, total=sum(sizes))
            for path, size in zip(paths, sizes, strict=True):
                left = at_most * size / max(sum(sizes), 1)
                for piece in read(path, separator, lambda file: bar.wrap_file(file, task_id=task)):
                    yield piece
                    left -= len(piece.text)
                    if left <= 0:
                        break

        yield pieces


def _vocabulary(tokenizer: str | int, files: dict[str, list[Path]], pieces: Pieces) -> Vocabulary:
    if tokenizer == "bytes":
        return vocabularies.of_bytes()
    if tokenizer == "characters":
        everything = [path for paths in files.values() for path in paths]
        return vocabularies.of_characters(piece.text for piece in pieces("characters", everything))
    if isinstance(tokenizer, str):
        return vocabularies.named(tokenizer)
    sample = pieces("vocabulary", files["train"], _SAMPLE)
    return vocabularies.learnt((piece.text for piece in sample), tokenizer)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Piece], vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of ``batch``, with the end-of-text token behind each document."""
    stream: list[np.ndarray] = []
    for piece, tokens in zip(batch, vocabulary.encode([piece.text for piece in batch]), strict=True):
        stream += [tokens, np.array([vocabulary.end])] if piece.ends else [tokens]
    return np.concatenate(stream)
