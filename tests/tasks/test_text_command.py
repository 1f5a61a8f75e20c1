"""The command ssmscan tokenize, and training and generating on what it writes."""

import json
import lzma
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ssmscan import cli
from ssmscan.tasks.text import Corpus, tokenization

SONGS = "to be or not to be\n<|endoftext|>\nthat is the question\n<|endoftext|>\n" * 20


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("songs1.txt.xz", "songs2.txt.xz", "valid.txt.xz", "test.txt.xz"):
        Path(name).write_bytes(lzma.compress(SONGS.encode()))
    Path("songs2.txt.xz").write_bytes(lzma.compress(b"to do\n"))
    return tmp_path


def _run(capsys, arguments, status=0):
    assert cli.main(shlex.split(arguments)) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def test_learns_a_bpe(here, capsys):
    out = _run(
        capsys,
        "tokenize --data songs1.txt.xz songs2.txt.xz --valid valid.txt.xz --test 'tes*' --vocab 280 --out books",
    )
    corpus = Corpus(Path("books"))
    sizes = {name: len(part) for name, part in corpus.parts.items()}
    assert out == (
        f"tokens: {sizes['train']:,} train, {sizes['eval']:,} eval, {sizes['test']:,} test; documents: 121; "
        f"bytes of text: {3 * 20 * 40 + 6:,}; vocabulary: 280; in books\n"
    )
    assert sizes["test"] == sizes["eval"] < sizes["train"] < sizes["eval"] + 9
    assert sizes["eval"] < 20 * 40 / 2
    assert AutoTokenizer.from_pretrained("books").eos_token_id == corpus.index.end_of_text == 0


def test_takes_a_tokenizer(here, capsys):
    _run(capsys, "tokenize --data songs2.txt.xz --vocab 262 --out first")
    _run(capsys, "tokenize --data valid.txt.xz --tokenizer first/tokenizer.json --held-out 0.5 --out second")
    for name in ("first", "./second"):
        _run(capsys, f"tokenize --data songs1.txt.xz --tokenizer {name} --out {name}-third")
    assert Path("first/tokenizer.json").read_bytes() == Path("second/tokenizer.json").read_bytes()
    assert Corpus(Path("first-third")).index == Corpus(Path("second-third")).index
    parts = json.loads(Path("second/index.json").read_text())["parts"]
    assert parts["eval"][1] - parts["eval"][0] == pytest.approx(parts["train"][1], abs=1)


def test_the_separator(here, capsys):
    _run(capsys, "tokenize --data songs1.txt.xz --tokenizer bytes --separator null --out one")
    _run(capsys, "tokenize --data songs1.txt.xz --tokenizer bytes --separator 'to be or not to be' --out others")
    assert sum(shard.documents for shard in Corpus(Path("one")).index.shards) == 1
    assert sum(shard.documents for shard in Corpus(Path("others")).index.shards) == 20


def test_trains_and_generates(here, capsys):
    _run(capsys, "tokenize --data songs1.txt.xz --vocab 280 --out books")
    train = "train --task.name text --task.data books --task.length 16 --model.mixers gated_ssm --steps 4 --device cpu"
    assert "bits per byte" in _run(capsys, f"{train} --batch_size 2 --eval_tokens 16 --out run")
    out = _run(capsys, "generate --model run --prompt 'to be' --max-new-tokens 8")
    assert out.startswith("to be")
    config = Path("run/config.yaml").read_text()
    assert "data: books\n" in config
    assert "sha256: " in config


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("", "ssmscan: the following arguments are required: tokenize.data, tokenize.out"),
        ("--data songs1.txt.xz --out out", "tokenize: one of --vocab and --tokenizer must be given, got none."),
        (
            "--data songs1.txt.xz --out out --vocab 300 --tokenizer bytes",
            "--vocab and --tokenizer must be given, got both.",
        ),
        ("--data songs1.txt.xz --out out --vocab many", "ssmscan: vocab must be int or null, got many."),
        ("--data songs1.txt.xz --out out --vocab 256", "text: vocab must be at least 257, got 256."),
        ("--data songs1.txt.xz --out . --vocab 300", "tokenize: --out must be a new folder, got ., which is there."),
        ("--data absent --out out --vocab 300", "text: --data must name files, got absent, which matches none."),
        (
            "--data songs* --valid a* --out out --vocab 300",
            "text: --valid must name files, got a*, which matches none.",
        ),
        (
            "--data songs* --test tiny.yaml --out out --vocab 300",
            "text: --test must be files in .txt, .jsonl, .parquet,",
        ),
        ("--data songs* --out out --vocab 300 --held-out 1", "text: held_out must be between 0 and 1, got 1.0."),
        (
            "--data songs* --out out --tokenizer absent.json",
            "text: tokenizer must be a file that tokenizers reads, got abs",
        ),
        (
            "--data bad.txt --out out --tokenizer bytes",
            "text: data must be UTF-8, got bad.txt, in which byte 3 is not.",
        ),
    ],
)
def test_wrong_usage(here, capsys, options, part):
    Path("bad.txt").write_bytes(b"abc\xff")
    Path("tiny.yaml").touch()
    before = sorted(here.rglob("*"))
    err = _run(capsys, f"tokenize {options}", status=2)
    assert part in err
    assert err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_a_folder_that_cannot_be_written(here, capsys):
    Path("file").touch()
    err = _run(capsys, "tokenize --data songs1.txt.xz --tokenizer bytes --out file/out", status=1)
    assert err == "tokenize: --out must be a folder that can be written, got file/out: Not a directory.\n"


def test_interrupted(here, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenization, "_encoded", interrupt)
    before = sorted(here.rglob("*"))
    err = _run(capsys, "tokenize --data songs1.txt.xz --tokenizer bytes --out out", status=130)
    assert err == "ssmscan: interrupted.\n"
    assert sorted(here.rglob("*")) == before


def test_help(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["tokenize", "--help"])
    assert status.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--vocab VOCAB learn a byte-level BPE of so many tokens from the data" in out
    assert "(type: float, default: 0.1)" in out
