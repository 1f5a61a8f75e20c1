"""The command ``ssmscan tokenize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ssmscan.shapes import error
from ssmscan.tasks.text.documents import SEPARATOR, find
from ssmscan.tasks.text.shards import Corpus
from ssmscan.tasks.text.tokenization import tokenize

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def tokenize_parser() -> ArgumentParser:
    """The parser of ``ssmscan tokenize``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Turn text into a folder of tokens, which is then the --task.data of the task text. Files are "
        ".txt, .jsonl or .parquet, as they are or compressed (.xz, .gz, .zst).",
    )
    for option, help_ in (
        ("data", "files to train on, folders of them, or globs"),
        ("valid", "files to evaluate on (default: the end of the data)"),
        ("test", "files for a third part, test"),
    ):
        parser.add_argument(f"--{option}", type=str, nargs="+", metavar="PATH", required=option == "data", help=help_)
    parser.add_argument("--out", type=str, required=True, help="the new folder")
    parser.add_argument(
        "--vocab", type=int | None, default=None, help="learn a byte-level BPE of so many tokens from the data"
    )
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="instead, a tokenizer that there is: bytes, characters, a JSON file of the library tokenizers, or a "
        "folder or name that transformers knows",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="fraction of the tokens to evaluate on where --valid names no file"
    )
    parser.add_argument(
        "--separator",
        type=str | None,
        default=SEPARATOR,
        help="a line of a .txt file that stands between two documents; null is that each file is one",
    )
    return parser


def run(values: Namespace) -> str:
    """Write the folder that the parsed ``values`` ask for, and return what there is to say of it."""
    out = Path(values.out)
    if out.exists():
        raise ValueError(error("tokenize", "--out must be a new folder", f"{out}, which is there"))
    if (values.vocab is None) == (values.tokenizer is None):
        got = "none" if values.vocab is None else "both"
        raise ValueError(error("tokenize", "one of --vocab and --tokenizer must be given", got))
    given = {"train": ("--data", values.data), "eval": ("--valid", values.valid), "test": ("--test", values.test)}
    files = {part: find(option, paths) for part, (option, paths) in given.items() if paths}
    tokenize(out, files, values.vocab or values.tokenizer, values.separator, values.held_out)
    index = Corpus(out, verify=False).index
    parts = ", ".join(f"{end - first:,} {part}" for part, (first, end) in index.parts.items())
    return f"tokens: {parts}; documents: {sum(shard.documents for shard in index.shards):,}; " + (
        f"bytes of text: {sum(shard.bytes for shard in index.shards):,}; vocabulary: {index.vocab_size:,}; in {out}"
    )
