"""A folder of tokens: one stream of them in files of bounded size, an index, and the tokenizer.

```text
index.json              what is below, as in Index
00000.tokens …          the stream: unsigned integers of 16 bits, or 32 where the vocabulary needs them, little-endian
token_bytes.npy         how many bytes of text each token stands for
tokenizer.json, …       the tokenizer, for AutoTokenizer
```

Each part of the data, ``train`` and ``eval`` at least, is a range of the stream. Behind each document stands the
end-of-text token, so the stream itself says where documents begin.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssmscan.shapes import error

if TYPE_CHECKING:
    from ssmscan.tasks.text.vocabulary import Vocabulary

FORMAT = 1
INDEX = "index.json"
_TOKEN_BYTES = "token_bytes.npy"
# A shard holds so many tokens, but for the last: a quarter or half of a gigabyte.
SHARD = 2**27


@dataclass(frozen=True)
class Shard:
    """One file of the stream: how many tokens, documents that end in it, and bytes of text its tokens stand for."""

    file: str
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """What index.json holds.

    Args:
        format: version of this layout.
        dtype: of a token, ``<u2`` or ``<u4``.
        vocab_size: number of tokens v.
        end_of_text: the token behind each document.
        parts: of each part its first token in the stream, and the one behind its last.
        shards: the files of the stream, in order.
        sha256: of each file in the folder but the index.
    """

    format: int
    dtype: str
    vocab_size: int
    end_of_text: int
    parts: dict[str, tuple[int, int]]
    shards: list[Shard]
    sha256: dict[str, str]


class Writer:
    """Writes the stream, shard by shard; :func:`writing` makes one."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.tokens = 0
        self._folder = folder
        self._vocabulary = vocabulary
        self._dtype = "<u2" if vocabulary.size <= 2**16 else "<u4"
        self._shards: list[Shard] = []

    def write(self, tokens: np.ndarray) -> None:
        """Add to the stream."""
        while len(tokens):
            filled = self.tokens % SHARD
            if filled == 0:
                self._shards.append(Shard(f"{len(self._shards):05d}.tokens", 0, 0, 0))
            shard, here = self._shards[-1], tokens[: SHARD - filled]
            with (self._folder / shard.file).open("ab") as file:
                file.write(here.astype(self._dtype).tobytes())
            self._shards[-1] = Shard(
                shard.file,
                shard.tokens + len(here),
                shard.documents + int((here == self._vocabulary.end).sum()),
                shard.bytes + int(self._vocabulary.token_bytes[here].sum()),
            )
            self.tokens += len(here)
            tokens = tokens[len(here) :]

    def finish(self, parts: dict[str, tuple[int, int]]) -> None:
        """Write the tokenizer and the index, after which the folder is whole."""
        self._vocabulary.tokenizer.save_pretrained(self._folder)
        np.save(self._folder / _TOKEN_BYTES, self._vocabulary.token_bytes)
        names = sorted(path.name for path in self._folder.iterdir())
        index = Index(
            format=FORMAT,
            dtype=self._dtype,
            vocab_size=self._vocabulary.size,
            end_of_text=self._vocabulary.end,
            parts=parts,
            shards=self._shards,
            sha256={name: digest(self._folder / name) for name in names},
        )
        (self._folder / INDEX).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")


@contextmanager
def writing(folder: Path, vocabulary: Vocabulary) -> Iterator[Writer]:
    """A new ``folder``, which is there when the block has ended with :meth:`Writer.finish`, or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield Writer(unfinished, vocabulary)
        unfinished.rename(folder)
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(folder)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Part:
    """A range of the stream, as a ring: behind its last token comes its first."""

    def __init__(self, shards: list[np.ndarray], first: int, end: int) -> None:
        self._shards = shards
        self._ends = list(accumulate(map(len, shards)))
        self._first, self._end = first, end

    def __len__(self) -> int:
        return self._end - self._first

    def read(self, places: np.ndarray, count: int) -> np.ndarray:
        """``count`` tokens from each of ``places`` (b,) on, counted from the part's first: (b, count), int64."""
        return np.stack([np.concatenate(list(self._pieces(int(place), count))) for place in places]).astype(np.int64)

    def _pieces(self, place: int, count: int) -> Iterator[np.ndarray]:
        while count:
            at = self._first + place % len(self)
            shard = bisect_right(self._ends, at)
            behind = at - self._ends[shard] + len(self._shards[shard])
            piece = self._shards[shard][behind : behind + min(count, self._end - at)]
            yield piece
            place += len(piece)
            count -= len(piece)


class Corpus:
    """A folder of tokens, opened: memory-mapped, so that only what is read is in memory.

    Args:
        folder: one that :func:`ssmscan.tasks.text.tokenize` wrote.
        verify: compare the SHA-256 of each shard too, beside its size.

    Raises:
        ValueError: a folder that has no index, or in which a file is missing or is not that of the index.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        width = np.dtype(self.index.dtype).itemsize
        sizes = {shard.file: shard.tokens * width for shard in self.index.shards}
        for name, expected in self.index.sha256.items():
            _check(folder / name, sizes.get(name), expected if verify or name not in sizes else None)
        self.token_bytes = np.load(folder / _TOKEN_BYTES)
        shards: list[np.ndarray] = [
            np.memmap(folder / shard.file, self.index.dtype, "r") for shard in self.index.shards
        ]
        self.parts = {name: Part(shards, *ends) for name, ends in self.index.parts.items()}


def _read_index(folder: Path) -> Index:
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            rule, advice = f"data must be a folder of tokens in format {FORMAT}", "Make it again with ssmscan tokenize."
            raise ValueError(error("text", rule, f"{path} in format {fields['format']}", advice))
        return Index(**fields | {"shards": [Shard(**shard) for shard in fields["shards"]]})
    except OSError as reason:
        got = f"{path}: {reason.strerror}"
    except (KeyError, TypeError, json.JSONDecodeError) as reason:
        got = f"{path}, which is broken: {reason}"
    raise ValueError(error("text", "data must be a folder of tokens with its index", got))


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    """``path`` has the size and the digest, where they are given."""
    advice = "Bring the file back, or remove the folder and make it again."
    found = path.stat().st_size if path.is_file() else "no file"
    if size not in (None, found):
        raise ValueError(error("text", f"{path} must have the {size} bytes of its index", found, advice))
    checksum = None if sha256 is None else digest(path)
    if sha256 != checksum:
        raise ValueError(error("text", f"{path} must have the SHA-256 {sha256} of its index", checksum, advice))


def digest(path: Path) -> str:
    """SHA-256 of a file as it lies on the disk."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as reason:
        raise ValueError(error("text", f"{path} must be readable", reason.strerror)) from None
