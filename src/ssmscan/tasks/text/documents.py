"""From files to documents.

A file of plain text is one document, or several with a line between them that holds nothing but a separator. Of a
table, a ``.jsonl`` or ``.parquet`` file, each row is one. Any may be compressed; nothing but a row is ever held whole.
"""

import codecs
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ssmscan.shapes import error

# A document of plain text longer than this comes in pieces, cut at line breaks (characters).
PIECE = 2**18
SEPARATOR = "<|endoftext|>"


class Piece(NamedTuple):
    """A document, or a part of one; ``ends`` with the last."""

    text: str
    ends: bool


def find(argument: str, named: str | Iterable[str]) -> list[Path]:
    """The files that ``named`` means, in its order: files, folders with all in them that has a known suffix, globs.

    Args:
        argument: what ``named`` is called in an error.
        named: one or several.

    Raises:
        ValueError: one that means no file, or a file of a kind that is not known.

    Example:
        >>> import pathlib, tempfile
        >>> from ssmscan.tasks.text.documents import find
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.txt", "a.jsonl", "README.md"):
        ...         _ = pathlib.Path(folder, name).touch()
        ...     [path.name for path in find("data", folder)], [path.name for path in find("data", f"{folder}/b*")]
        (['a.jsonl', 'b.txt'], ['b.txt'])
    """
    found: list[Path] = []
    for name in [named] if isinstance(named, str) else named:
        path = Path(name)
        if path.is_dir():
            matches = sorted(inside for inside in path.rglob("*") if inside.is_file() and kind(inside) in _READERS)
        elif path.exists():
            matches = [path]
        else:
            matches = [path for path in map(Path, sorted(glob.glob(name, recursive=True))) if path.is_file()]
        if not matches:
            raise ValueError(error("text", f"{argument} must name files", f"{name}, which matches none"))
        found += matches
    for path in found:
        if kind(path) not in _READERS:
            rule = f"{argument} must be files in {', '.join(_READERS)}, as they are or in {', '.join(_OPENERS)}"
            raise ValueError(error("text", rule, path))
    return found


def read(
    path: Path, separator: str | None, watch: Callable[[BinaryIO], BinaryIO] = lambda file: file
) -> Iterator[Piece]:
    """The documents of a file.

    Args:
        path: a file that :func:`find` returned.
        separator: the line that divides documents in a file of plain text; None is that such a file is one document.
        watch: what the file is read through, as it lies on the disk; for a progress bar.

    Yields:
        each document with text in it, in pieces.

    Raises:
        ValueError: a file that cannot be read, is empty, or is not what its name says; file and place are named.

    Example:
        >>> import pathlib, tempfile
        >>> from ssmscan.tasks.text.documents import read
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "songs.txt")
        ...     _ = path.write_text("la la\\n<|endoftext|>\\nso fa\\nmi\\n")
        ...     [piece.text for piece in read(path, "<|endoftext|>")]
        ['la la\\n', 'so fa\\nmi\\n']
    """
    empty = True
    try:
        with (
            path.open("rb", buffering=0) as file,
            io.BufferedReader(cast(io.RawIOBase, watch(file)), PIECE) as buffered,
            _OPENERS.get(path.suffix, nullcontext)(buffered) as content,
        ):
            for piece in _READERS[kind(path)](content, path, separator):
                empty = False
                yield piece
    except ValueError:
        raise
    except Exception as reason:  # Every compression has an error of its own for what is broken.
        raise _refusal("be readable", f"{path}: {getattr(reason, 'strerror', None) or reason}") from None
    if empty:
        raise _refusal("hold text", f"{path}, which is empty")


def kind(path: Path) -> str:
    """The suffix that says how to read a file, without a compression's."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix


def _refusal(rule: str, got: str, advice: str = "") -> ValueError:
    return ValueError(error("text", f"data must {rule}", got, advice))


def _zstandard(file: BinaryIO) -> BinaryIO:
    if find_spec("compression") is not None:  # Python 3.14 and later.
        return import_module("compression.zstd").open(file)
    if find_spec("zstandard") is None:
        raise _refusal("be readable", ".zst without zstandard", "Run pip install zstandard.")
    decompressor = import_module("zstandard").ZstdDecompressor()
    return io.BufferedReader(decompressor.stream_reader(file, read_across_frames=True), PIECE)


def _plain(content: BinaryIO, path: Path, separator: str | None) -> Iterator[Piece]:
    lines: list[str] = []
    size = 0
    # One more separator, so that a document ends with the file too.
    for line in chain(_lines(content, path, PIECE), [separator]):
        ends = line is None or line.rstrip("\r\n") == separator
        if lines and (ends or size >= PIECE):
            yield Piece("".join(lines), ends)
            lines, size = [], 0
        if line is not None and not ends:
            lines.append(line)
            size += len(line)


def _rows(content: BinaryIO, path: Path, separator: str | None) -> Iterator[Piece]:
    for number, line in enumerate(_lines(content, path), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as reason:
            raise _refusal("hold JSON on each line", f"{path}, line {number}: {reason}") from None
        text = row.get("text") if isinstance(row, dict) else None
        yield from _row(text, f"{path}, line {number}")


def _table(content: BinaryIO, path: Path, separator: str | None) -> Iterator[Piece]:
    if find_spec("pyarrow") is None:
        raise _refusal("be readable", f"{path} without pyarrow", "Run pip install pyarrow.")
    table = import_module("pyarrow.parquet").ParquetFile(content)
    if "text" not in table.schema_arrow.names:
        raise _refusal('have text in the field "text"', f"{path}, which has {', '.join(table.schema_arrow.names)}")
    batches = table.iter_batches(batch_size=256, columns=["text"])
    for number, text in enumerate(chain.from_iterable(batch.column("text").to_pylist() for batch in batches), 1):
        yield from _row(text, f"{path}, row {number}")


def _row(text: object, place: str) -> Iterator[Piece]:
    if not isinstance(text, str):
        raise _refusal('have text in the field "text"', f"{place}, which has none")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal("be Unicode", f"{place}, which has half of a surrogate pair") from None
    if text:
        yield Piece(text, True)


def _lines(content: BinaryIO, path: Path, limit: int = -1) -> Iterator[str]:
    """The lines of a file in UTF-8, with their ends; one of more than ``limit`` bytes in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, more = 0, True
    while more:
        block = content.readline(limit)
        more = block != b""
        try:
            line = decoder.decode(block, final=not more)
        except UnicodeDecodeError as reason:
            # The bytes that the decoder has kept of the block before stand in front of this one.
            place = offset + len(block) - len(reason.object) + reason.start
            raise _refusal("be UTF-8", f"{path}, in which byte {place} is not", "Convert it with iconv.") from None
        line = line if offset else line.removeprefix("\ufeff")
        offset += len(block)
        if line:
            yield line


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _zstandard}
_READERS: dict[str, Callable[[BinaryIO, Path, str | None], Iterator[Piece]]] = {
    ".txt": _plain,
    ".jsonl": _rows,
    ".parquet": _table,
}
