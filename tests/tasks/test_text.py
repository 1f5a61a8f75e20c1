"""The task: windows in a random order or one after the other, documents, measures, and data that is refused."""

import json
import math
import shutil
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmscan.tasks import IGNORE, Text
from ssmscan.tasks.text import find, shards, task, tokenize, windows

# The last tenth, which is held out, is of digits; beyond the basic plane as well.
CONTENT = "Ünder  the\tgreenwood trée,\r\n𝔗heir names\n" * 18 + "0123456789" * 8
END = 256


@pytest.fixture
def play(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(CONTENT.encode())
    return Text(str(path), length=20)


@pytest.fixture
def songs(tmp_path):
    """Documents of 1 to 13 bytes, each of one letter, that go over the bounds of shards and of the parts."""
    texts = [chr(ord("a") + i % 26) * (1 + 5 * i % 13) for i in range(60)]
    (tmp_path / "songs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Text(str(tmp_path / "songs.jsonl"), length=16, vocabulary="bytes", held_out=0.2)


def _stream(text, part):
    return text.corpus.parts[part].read(np.array([0]), len(text.corpus.parts[part]))[0]


def _texts(text, rows):
    return [text.tokenizer().decode(row) for row in rows.tolist()]


def test_characters_are_the_vocabulary(play):
    assert play.vocab_size == len(set(CONTENT)) + 1
    assert play.tokenizer().decode(_stream(play, "train").tolist()) == CONTENT[:-80]
    assert play.tokenizer().decode(_stream(play, "eval").tolist()) == CONTENT[-80:] + "<|endoftext|>"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_windows(play, split):
    tokens, targets, _ = play.batch(3, seed=0, index=3, split=split)
    assert tokens.shape == targets.shape == (3, 20)
    assert tokens.dtype == targets.dtype == torch.int64
    assert play.example_length == 20
    asked = targets != IGNORE
    assert torch.equal(tokens[:, 1:][asked[:, :-1]], targets[:, :-1][asked[:, :-1]])
    assert asked.sum() >= 59
    for text in _texts(play, tokens[asked.all(1)]):
        assert text in f"{CONTENT}<|endoftext|>"


@pytest.mark.parametrize("tokens", [17, 160, 331])
def test_each_token_is_seen_once_in_an_epoch(tokens):
    """But for a rest that is shorter than a window; in other windows in the next one."""
    count = tokens // 16
    firsts = []
    for epoch in range(3):
        places = windows.shuffled(tokens, 16, seed=5, first=epoch * count, count=count)
        seen = np.bincount((places[:, None] + np.arange(16)).ravel() % tokens, minlength=tokens)
        assert seen.sum() == count * 16
        assert seen.max() == 1
        assert count < 9 or not np.array_equal(np.sort(places), places)
        firsts.append(places[0] % 16)
    assert len(set(firsts)) > 1


@pytest.mark.parametrize("split", ["train", "eval"])
def test_examples_are_numbered_through(songs, split):
    """The same ones in batches of any size, from any batch on, over the ends of epochs."""
    whole = songs.batch(60, seed=3, index=0, split=split)
    again = replace(songs)
    for size in (1, 4, 15):
        for index in (0, 1, 60 // size - 1):
            batch = again.batch(size, seed=3, index=index, split=split)
            assert torch.equal(batch.tokens, whole.tokens[index * size :][:size])
            assert torch.equal(batch.targets, whole.targets[index * size :][:size])
    other = songs.batch(60, seed=4, index=0, split=split)
    assert torch.equal(other.tokens, whole.tokens) == (split == "eval")


def test_far_batches_are_quick_to_have(songs):
    for split in ("train", "eval"):
        assert songs.batch(2, seed=0, index=2**63, split=split).tokens.shape == (2, 16)


def test_evaluation_goes_through_the_part_in_order(songs):
    count = songs.held_out_examples
    stream = torch.from_numpy(_stream(songs, "eval"))
    assert count == (len(stream) - 1) // 16
    batch = songs.batch(count + 1, seed=9, index=0, split="eval")
    assert torch.equal(batch.tokens[:count].flatten(), stream[: 16 * count])
    assert torch.equal(batch.tokens[count], batch.tokens[0])


def test_documents_are_kept_apart(songs):
    """Each window once more by hand: where documents begin, and what is not to be foretold."""
    ring = _stream(songs, "train")
    begins = np.roll(ring == END, 1)
    begins[0] = True
    places = windows.shuffled(len(ring), 16, seed=1, first=0, count=30)
    batch = songs.batch(30, seed=1, index=0, split="train")
    assert batch.starts.dtype == torch.bool
    for row, place in enumerate(places):
        at = (place + np.arange(17)) % len(ring)
        assert batch.tokens[row].tolist() == ring[at[:-1]].tolist()
        assert batch.targets[row].tolist() == np.where(begins[at[1:]], IGNORE, ring[at[1:]]).tolist()
        assert batch.starts[row].tolist() == [False, *begins[at[1:-1]].tolist()]
    assert (batch.targets == END).sum() > 0
    assert (batch.targets[batch.tokens == END] == IGNORE).all()


def test_documents_can_be_one_stream(songs):
    batch = replace(songs, packing="concatenate").batch(4, seed=0, index=0, split="eval")
    assert batch.starts is None
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert (batch.targets == END).any()


def test_one_stream_runs_on_behind_its_end(songs):
    """Every batch has one shape, that with the ring's end too; the first token is foretold from nothing."""
    ring = _stream(songs, "train")
    whole = replace(songs, packing="concatenate").batch(len(ring) // 16, seed=0, index=0, split="train")
    assert whole.starts is None
    assert (whole.targets == IGNORE).sum() <= 1
    assert (whole.targets[whole.targets != IGNORE] == END).any()


def test_a_text_without_documents_has_no_starts(play):
    assert play.batch(2, seed=0, index=0, split="eval").starts is None
    count = len(play.corpus.parts["train"]) // 20
    # The ring's end is in one window, or lies between two.
    ends = [play.batch(1, seed=0, index=i, split="train").starts is not None for i in range(count)]
    assert sum(ends) <= 1


def test_packed_documents_are_the_model_s_sequences(songs):
    """What the batch becomes has one sequence for each document, or part of one, in a row."""
    batch = songs.batch(4, seed=0, index=0, split="train")
    bounds = batch.inputs(torch.device("cpu"))["cu_seqlens"].tolist()
    tokens = batch.tokens.flatten()
    assert {0, 16, 32, 48, 64} <= set(bounds)
    for first, end in pairwise(bounds):
        assert not (tokens[first : end - 1] == END).any()


def test_two_parts(tmp_path):
    (tmp_path / "train.txt").write_text("to be or not" * 9)
    (tmp_path / "valid.txt").write_text("what is he" * 9)
    text = Text([str(tmp_path / "train.txt")], length=8, valid=str(tmp_path / "valid.txt"))
    assert text.tokenizer().decode(_stream(text, "eval").tolist()) == "what is he" * 9 + "<|endoftext|>"
    assert text.tokenizer().decode(_stream(text, "train").tolist()) == "to be or not" * 9 + "<|endoftext|>"


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_measures(play, vocabulary):
    """Bits over the bytes of the targets; what is not asked for counts for neither."""
    text = replace(play, vocabulary=vocabulary)
    tokenizer = text.tokenizer()
    targets = torch.tensor([*tokenizer.encode("Ü𝔗e"), tokenizer.eos_token_id, IGNORE])[None]
    logits = torch.randn(*targets.shape, text.vocab_size)
    logits[0, 0, targets[0, 0]] = 100
    measures = text.measure(logits, targets)
    nats = -logits.log_softmax(-1)[0, :-1].gather(1, targets[0, :-1, None]).sum()
    assert measures["bits_per_byte"].answers == 2 + 4 + 1
    assert measures["bits_per_byte"].total == pytest.approx(nats.item() / math.log(2), rel=1e-6)
    assert measures["loss"].answers == targets.numel() - 1
    assert measures["accuracy"].total >= 1


def test_rendering(play):
    tokens = torch.tensor(play.tokenizer().encode("\ngreen 01"))
    assert play.render(tokens[:-1], tokens[1:], tokens.roll(-1)[1:]).splitlines() == [
        "text      green 01",
        "model     reen 01 ",
    ]
    targets = tokens[1:].clone()
    targets[5] = IGNORE
    assert play.render(tokens[:-1], targets, tokens[:-1]).splitlines() == ["text      green01", "model      gree 0"]


def test_titles(play):
    assert play.title == "text of play.txt, 20 tokens at a time"
    assert replace(play, data=["a/b.txt", "c.txt"]).title == "text of b.txt …, 20 tokens at a time"


def test_tokens_are_made_once(play, tmp_path, monkeypatch):
    monkeypatch.setenv("SSMSCAN_CACHE", str(tmp_path))
    folder = play.corpus.folder
    monkeypatch.setattr(task, "tokenize", None)
    assert replace(play, length=30).corpus.folder == folder
    assert replace(play, data=[play.data]).corpus.folder == folder
    renamed = Path(play.data).with_name("other.txt")
    renamed.write_bytes(CONTENT.encode())
    assert replace(play, data=str(renamed)).corpus.folder == folder
    for changed in (
        {"vocabulary": "bytes"},
        {"held_out": 0.2},
        {"separator": None},
        {"valid": play.data},
        {"data": [play.data, play.data]},
    ):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            _ = replace(play, **changed).corpus


def test_where_tokens_are_kept(play, tmp_path, monkeypatch):
    monkeypatch.setenv("SSMSCAN_CACHE", str(tmp_path / "mine"))
    assert replace(play).corpus.folder.parent == tmp_path / "mine"
    monkeypatch.delenv("SSMSCAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    assert replace(play).corpus.folder.parent == tmp_path / "theirs" / "ssmscan"


def test_pinned(play):
    pinned = play.pinned()
    assert pinned.pinned() == pinned
    assert replace(pinned).vocab_size == play.vocab_size
    with pytest.raises(FrozenInstanceError):
        pinned.length = 3
    changed = [replace(pinned, vocabulary="bytes"), replace(pinned)]
    Path(play.data).write_bytes(CONTENT.encode()[1:])
    for other in changed:
        with pytest.raises(ValueError, match=r"^text: data must have the SHA-256 \w{64}, got \w{64}\. Its content has"):
            _ = other.vocab_size


def test_a_changed_tokenizer(play, tmp_path):
    path = tmp_path / "tokenizer.json"
    play.tokenizer().backend_tokenizer.save(str(path))
    pinned = replace(play, vocabulary=str(path)).pinned()
    assert replace(pinned).vocab_size == play.vocab_size
    path.write_text(path.read_text().replace('"isolated"', '"Isolated"').replace('"Ü"', '"Ö"'))
    with pytest.raises(ValueError, match=r"Its content has changed, or its tokenizer: bring the old one back"):
        _ = replace(pinned).vocab_size


@pytest.fixture
def folder(songs, tmp_path):
    """A folder of tokens, in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 100)
        tokenize(tmp_path / "tokens", {"train": find("data", songs.data)}, "bytes", held_out=0.2)
    return tmp_path / "tokens"


def test_a_folder_of_tokens(songs, folder):
    """Gives what its files give, wherever it is, and is refused when another is in its place."""
    text = Text(str(folder), length=16)
    for split in ("train", "eval"):
        for ours, theirs in zip(text.batch(9, 0, 2, split), songs.batch(9, 0, 2, split), strict=True):
            assert torch.equal(ours, theirs)
    pinned = text.pinned()
    moved = folder.rename(folder.with_name("moved"))
    assert replace(pinned, data=str(moved)).vocab_size == 257
    tokenize(folder, {"train": find("data", songs.data)}, "bytes", held_out=0.3)
    with pytest.raises(ValueError, match=r"text: data must have the SHA-256 \w{64}, got \w{64}\. Its content has"):
        _ = replace(pinned).vocab_size


@pytest.mark.parametrize("option", [{"vocabulary": "bytes"}, {"valid": "a.txt"}])
def test_a_folder_of_tokens_has_its_own(folder, option):
    ((name, value),) = option.items()
    rule, advice = f"text: {name} must be null where data is a folder of tokens", f"Give --task.{name} null."
    with pytest.raises(ValueError, match=rf"{rule}, which has its own, got {value}\. {advice}"):
        _ = Text(str(folder), length=16, **option).vocab_size


def test_shards_that_are_not_those_of_the_index(folder):
    path = folder / "00000.tokens"
    path.write_bytes(np.full(100, 257, dtype="<u2").tobytes())
    with pytest.raises(ValueError, match=r"text: .*00000\.tokens must have the SHA-256"):
        _ = Text(str(folder), length=16).vocab_size
    with pytest.raises(ValueError, match=r"text: tokens must be 0 to 256, got 257 in .*tokens\. A file of the"):
        Text(str(folder), length=16, verify=False).batch(30, 0, 0, "train")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, r"data must name files, got .*play\.txt, which matches none\."),
        (b"", r"data must hold text, got .*play\.txt, which is empty\."),
        (b"a" * 199, r"data must have more than length = 20 tokens .* evaluate, got 180 and 20 in .*play\.txt\."),
        (b"a" * 4, r"data must have more than length = 20 tokens .* evaluate, got 4 and 1 in .*play\.txt\."),
        (b"abc\xff" * 200, r"data must be UTF-8, got .*play\.txt, in which byte 3 is not\. Convert it"),
    ],
)
def test_files_that_are_refused(tmp_path, content, part):
    path = tmp_path / "play.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^text: {part}"):
        _ = Text(str(path), length=20).vocab_size


def test_the_shortest_text(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(b"a" * 41)
    text = Text(str(path), length=20, held_out=0.5)
    assert len(text.corpus.parts["train"]) == len(text.corpus.parts["eval"]) == 21
    assert text.held_out_examples == 1
    for split in ("train", "eval"):
        assert text.batch(3, 0, 0, split).targets.shape == (3, 20)


def test_a_part_that_is_missing(songs, folder):
    index = json.loads((folder / "index.json").read_text())
    del index["parts"]["eval"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"more than length = 16 tokens to train on, and to evaluate, got \d+ and 0"):
        _ = Text(str(folder), length=16).vocab_size


def test_a_cached_folder_that_is_broken(play):
    folder = play.corpus.folder
    (folder / "00000.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.tokens must have the .* got 0\. Bring the file back, or remove the"):
        _ = replace(play).corpus
    shutil.rmtree(folder)
    assert replace(play).vocab_size == play.vocab_size


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 1.5}, "length must be an integer, got 1.5"),
        ({"held_out": 0.0}, "held_out must be between 0 and 1, got 0.0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
        ({"packing": "tight"}, "packing must be documents or concatenate, got tight"),
    ],
)
def test_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=f"text: {part}"):
        Text("absent.txt", **keywords)
