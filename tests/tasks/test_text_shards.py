"""The folder of tokens: what is in it, parts, shards of bounded size, and files that are not those of the index."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ssmscan.tasks.text import Corpus, documents, find, shards, tokenization, tokenize

SONG = "la la\n<|endoftext|>\nso fa mi\n<|endoftext|>\ndö\n"
STREAM = [*b"la la\n", 256, *b"so fa mi\n", 256, *"dö\n".encode(), 256]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "SHARD", 8)
    Path("song.txt").write_text(SONG, encoding="utf-8")
    return tmp_path


def _tokenize(out="out", tokenizer="bytes", **options):
    files = {"train": find("data", "song.txt")}
    tokenize(Path(out), files | options.pop("files", {}), tokenizer, **options)
    return Corpus(Path(out))


def _all(part):
    return part.read(np.array([0]), len(part))[0].tolist()


def test_what_is_in_the_folder(here):
    corpus = _tokenize(held_out=0.25)
    index = json.loads(Path("out/index.json").read_text())
    assert index["format"] == 1
    assert (index["dtype"], index["vocab_size"], index["end_of_text"]) == ("<u2", 257, 256)
    assert index["parts"] == {"train": [0, 16], "eval": [16, 22]}
    assert index["shards"] == [
        {"file": "00000.tokens", "tokens": 8, "documents": 1, "bytes": 7},
        {"file": "00001.tokens", "tokens": 8, "documents": 0, "bytes": 8},
        {"file": "00002.tokens", "tokens": 6, "documents": 2, "bytes": 4},
    ]
    names = {path.name for path in Path("out").iterdir()}
    assert names == {*index["sha256"], "index.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "token_bytes.npy"} < names
    assert b"".join(Path("out", shard["file"]).read_bytes() for shard in index["shards"]) == (
        np.array(STREAM, dtype="<u2").tobytes()
    )
    assert corpus.token_bytes.tolist() == [1] * 256 + [0]
    assert AutoTokenizer.from_pretrained("out").decode(STREAM) == SONG.replace("<|endoftext|>\n", "<|endoftext|>") + (
        "<|endoftext|>"
    )
    assert list(here.glob("*unfinished*")) == []


def test_parts(here):
    Path("valid.txt").write_text("mi\n")
    Path("test.jsonl").write_text('{"text": "re"}\n')
    corpus = _tokenize(files={"eval": [Path("valid.txt")], "test": [Path("test.jsonl")]})
    assert {name: _all(part) for name, part in corpus.parts.items()} == {
        "train": STREAM,
        "eval": [*b"mi\n", 256],
        "test": [*b"re", 256],
    }
    assert corpus.index.parts["test"] == [26, 29]


@pytest.mark.parametrize(("held_out", "kept"), [(0.25, 6), (0.01, 1), (0.95, 21)])
def test_the_end_is_held_out(here, held_out, kept):
    corpus = _tokenize(held_out=held_out)
    assert _all(corpus.parts["train"]) == STREAM[: 22 - kept]
    assert _all(corpus.parts["eval"]) == STREAM[22 - kept :]


def test_a_part_is_a_ring(here):
    part = _tokenize(held_out=0.25).parts["train"]
    rows = part.read(np.array([0, 3, 15]), 40)
    assert rows.shape == (3, 40)
    assert rows.dtype == np.int64
    ring = STREAM[:16] * 4
    assert rows.tolist() == [ring[:40], ring[3:43], ring[15:55]]


def test_texts_are_encoded_in_batches(here, monkeypatch):
    """Whose size changes nothing."""
    whole = _tokenize()
    monkeypatch.setattr(tokenization, "_BATCH", 1)
    pieces = _tokenize("pieces")
    assert pieces.index == whole.index


def test_a_large_vocabulary_takes_four_bytes(here):
    """More than 65,536 tokens do not fit into two."""
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(map(chr, range(0x20000, 0x20000 + 45_600)))
    Path("song.txt").write_text(characters, encoding="utf-8")
    shards.SHARD = 2**27
    corpus = _tokenize(tokenizer="characters")
    assert corpus.index.dtype == "<u4"
    assert corpus.index.vocab_size == 65_601
    assert [*_all(corpus.parts["train"]), *_all(corpus.parts["eval"])] == list(range(65_601))


def test_a_bpe_is_learnt_from_a_sample_of_each_file(here, monkeypatch):
    for name, word in (("a.txt", "early"), ("b.txt", "later")):
        Path(name).write_text(f"{word} {word}\n<|endoftext|>\n" * 30 + "last last last\n" * 20)
    monkeypatch.setattr(tokenization, "_SAMPLE", 100)
    tokenize(Path("out"), {"train": find("data", ["a.txt", "b.txt"])}, 300)
    words = set(AutoTokenizer.from_pretrained("out").get_vocab())
    assert {"early", "Ġearly", "later", "Ġlater"} < words
    assert not {"last", "Ġlast"} & words


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", 300])
def test_memory_does_not_grow_with_the_data(here, monkeypatch, tokenizer):
    """A megabyte of text goes through half of one, most of it buffers of files."""
    monkeypatch.setattr(shards, "SHARD", 2**27)
    monkeypatch.setattr(documents, "PIECE", 2**10)
    monkeypatch.setattr(tokenization, "_BATCH", 2**11)
    _tokenize("warm", tokenizer)
    Path("song.txt").write_text((("la " * 20 + "\n") * 20 + "<|endoftext|>\n") * 800)
    tracemalloc.start()
    try:
        _tokenize("out", tokenizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 750_000


def test_a_failure_leaves_nothing(here, monkeypatch):
    Path("song.txt").write_bytes(b"la\n" * 9 + b"\xff")
    for tokenizer in ("bytes", "characters", 257):
        with pytest.raises(ValueError, match=r"text: data must be UTF-8, got song\.txt, in which byte 27 is not"):
            _tokenize(tokenizer=tokenizer)
    assert os.listdir() == ["song.txt"]


def test_a_folder_that_cannot_be_written(here):
    with pytest.raises(OSError, match=r"Not a directory: 'song\.txt/out'"):
        _tokenize("song.txt/out")


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_fractions_that_are_refused(here, held_out):
    with pytest.raises(ValueError, match="text: held_out must be between 0 and 1, got"):
        _tokenize(held_out=held_out)


ADVICE = r"\. Bring the file back, or remove the folder and make it again\."


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("00001.tokens", lambda content: content[:-2], "16 bytes of its index, got 14"),
        ("00001.tokens", lambda content: content + b"a", "16 bytes of its index, got 17"),
        ("00001.tokens", lambda _: None, "16 bytes of its index, got no file"),
        ("00001.tokens", lambda content: b"a" + content[1:], r"SHA-256 \w{64} of its index, got \w{64}"),
        ("tokenizer.json", lambda content: content + b" ", r"SHA-256 \w{64} of its index, got \w{64}"),
        ("token_bytes.npy", lambda content: content[:-1] + b"\1", r"SHA-256 \w{64} of its index, got \w{64}"),
    ],
)
def test_changed_files_are_refused(here, file, change, part):
    _tokenize()
    path = Path("out", file)
    changed = change(path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"text: out/{file} must have the {part}{ADVICE}"):
        Corpus(Path("out"))


def test_a_missing_file_is_refused(here):
    _tokenize()
    Path("out/tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"text: out/tokenizer\.json must be readable, got No such file or directory\."
    ):
        Corpus(Path("out"))


def test_checksums_of_shards_can_be_passed_over(here):
    _tokenize()
    Path("out/00001.tokens").write_bytes(bytes(16))
    assert _all(Corpus(Path("out"), verify=False).parts["train"])[8:16] == [0] * 8


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, r"with its index, got out/index\.json: No such file or directory\."),
        ("{", r"with its index, got out/index\.json, which is broken: Expecting"),
        ("{}", r"with its index, got out/index\.json, which is broken: 'format'\."),
        ('{"format": 1, "shards": []}', r"with its index, got out/index\.json, which is broken: .*missing 5"),
        ('{"format": 2}', r"in format 1, got out/index\.json in format 2\. Make it again with ssmscan tokenize\."),
    ],
)
def test_indices_that_are_refused(here, content, part):
    _tokenize()
    path = Path("out/index.json")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"text: data must be a folder of tokens {part}"):
        Corpus(Path("out"))
