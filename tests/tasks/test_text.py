"""The characters of a file: pieces, the held-out end, the vocabulary, tokens back into text, files that are refused."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from transformers import AutoTokenizer

from ssmscan.tasks import Text

# The last tenth, which is held out, is of digits; beyond the basic plane as well.
CONTENT = "Ünder  the\tgreenwood trée,\r\n𝔗heir names\n" * 18 + "0123456789" * 8


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(CONTENT.encode())
    return Text(str(path), length=20)


def _texts(task, rows):
    return ["".join(task.characters[token] for token in row) for row in rows.tolist()]


def test_the_vocabulary(task):
    assert task.characters == sorted(set(CONTENT))
    assert task.vocab_size == len(set(CONTENT))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_pieces(task, split):
    tokens, targets, _ = task.batch(50, seed=0, index=3, split=split)
    assert tokens.shape == targets.shape == (50, 20)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for first, rest in zip(_texts(task, tokens[:, :1]), _texts(task, targets), strict=True):
        assert first + rest in CONTENT


def test_the_end_is_held_out(task):
    held_out = math.ceil(0.1 * len(CONTENT))
    assert held_out == 80
    train = "".join(_texts(task, task.batch(500, 0, 0, "train").targets))
    held = "".join(_texts(task, task.batch(500, 0, 0, "eval").targets))
    assert not set(train) & set("0123456789")
    assert set(held) <= set("0123456789")


def test_pieces_begin_anywhere(task):
    """At the first place and at the last one too, each as often: the digits at either end are a tenth."""
    part = task.parts["eval"]
    tokens, targets, _ = task.batch(40_000, 0, 0, "eval")
    pieces = torch.cat([tokens[:, :1], targets], 1)
    for end in (part[:21], part[-21:]):
        share = (pieces == torch.from_numpy(end.astype("int64"))).all(1).double().mean()
        assert abs(share - 0.1) < 0.01


def test_streams(task):
    batch = task.batch(8, seed=3, index=5, split="train")
    again = replace(task).batch(8, seed=3, index=5, split="train")
    assert torch.equal(batch.tokens, again.tokens)
    for seed, index in ((3, 6), (4, 5)):
        assert not torch.equal(batch.tokens, task.batch(8, seed, index, "train").tokens)


def test_the_tokenizer(task, tmp_path):
    """As transformers finds it again beside a model."""
    task.tokenizer().save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    tokens = tokenizer.encode(CONTENT)
    assert tokens == [task.characters.index(character) for character in CONTENT]
    assert tokenizer.decode(tokens) == CONTENT


def test_measures(task):
    targets = torch.tensor([[0, 1, 2, 0]])
    logits = torch.eye(task.vocab_size)[targets.roll(1)]
    measures = task.measure(logits, targets)
    assert measures["accuracy"] == (1, 4)
    assert measures["bits_per_character"].total == pytest.approx(measures["loss"].total / math.log(2))
    assert measures["bits_per_character"].answers == 4


def test_rendering(task):
    tokens = torch.tensor([task.characters.index(character) for character in "\ngreen 01"])
    assert task.render(tokens[:-1], tokens[1:], tokens.roll(-1)[1:]).splitlines() == [
        "text      green 01",
        "model     reen 01 ",
    ]


def test_pinned(task, tmp_path):
    pinned = task.pinned()
    assert pinned.pinned() == pinned
    assert pinned.vocab_size == task.vocab_size
    (tmp_path / "play.txt").write_bytes(CONTENT.encode()[1:])
    with pytest.raises(ValueError, match=r"text: data must have the SHA-256 \w{64}, got \w{64}\. Its content has"):
        _ = replace(pinned).vocab_size
    with pytest.raises(FrozenInstanceError):
        pinned.length = 3


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "bom.txt").write_text("abc" * 50, encoding="utf-8-sig")
    assert Text(str(tmp_path / "bom.txt"), length=4).characters == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, r"text: data must be a file, got .*play\.txt: No such file or directory\."),
        (b"", r"text: data must have more than length = 20 characters .* got 0 and 0 in .*play\.txt\."),
        (b"a" * 200, r"text: data must have more than length = 20 characters .* got 180 and 20 in .*play\.txt\."),
        (b"abc\xff" * 200, r"text: data must be UTF-8, got .*play\.txt, in which byte 3 is not\. Convert it"),
    ],
)
def test_files_that_are_refused(tmp_path, content, part):
    path = tmp_path / "play.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=part):
        _ = Text(str(path), length=20).vocab_size


def test_the_shortest_text(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(b"ab" * 105)
    assert Text(str(path), length=20).batch(3, 0, 0, "eval").targets.shape == (3, 20)


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 1.5}, "length must be an integer, got 1.5"),
        ({"held_out": 0.0}, "held_out must be between 0 and 1, got 0.0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
    ],
)
def test_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=f"text: {part}"):
        Text("absent.txt", **keywords)
