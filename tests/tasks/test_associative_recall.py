"""Associative recall: what an example is, where the queries stand, the rendering, the refusals."""

import pytest
import torch

from ssmscan.tasks import IGNORE, AssociativeRecall

KEYS, VALUES, NOISE = 6, 4, 10


@pytest.mark.parametrize("length", [9, 10, 20])
def test_an_example(length):
    task = AssociativeRecall(pairs=3, key_symbols=KEYS, value_symbols=VALUES, length=length)
    tokens, targets, _ = task.batch(100, seed=0, index=0, split="train")
    assert task.vocab_size == NOISE + 1
    assert tokens.shape == targets.shape == (100, length)
    keys, values = tokens[:, 0:6:2], tokens[:, 1:6:2]
    assert set(keys.flatten().tolist()) == set(range(KEYS))
    assert set(values.flatten().tolist()) == set(range(KEYS, NOISE))
    assert all(len(set(row)) == 3 for row in keys.tolist())
    assert (targets[:, :6] == IGNORE).all()
    asked = tokens[:, 6:] != NOISE
    assert torch.equal(asked, targets[:, 6:] != IGNORE)
    assert (asked.sum(1) == 3).all()
    for example, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(example[0:6:2], example[1:6:2], strict=True))
        queries = [(token, answer) for token, answer in zip(example[6:], answers[6:], strict=True) if token != NOISE]
        assert {key for key, _ in queries} == value_of.keys()
        assert all(value_of[key] == answer for key, answer in queries)


@pytest.mark.parametrize("power", [1, 0.5, 0.01])
def test_places_of_a_query(power):
    """A single query is the g-th token behind the pair with a probability in proportion to g^(power - 1)."""
    task = AssociativeRecall(pairs=1, key_symbols=2, value_symbols=1, length=12, power=power)
    tokens = task.batch(20_000, seed=0, index=0, split="train").tokens[:, 2:]
    share = (tokens != 3).double().mean(0)
    expected = torch.arange(1, 11).double() ** (power - 1)
    # Five standard deviations are at most 0.018.
    assert (share - expected / expected.sum()).abs().max() < 0.018


def test_any_key_comes_first():
    task = AssociativeRecall(pairs=3, key_symbols=3, value_symbols=1, length=9)
    tokens = task.batch(3000, seed=0, index=0, split="train").tokens
    orders = (tokens[:, 6:, None] == tokens[:, None, 0:6:2]).int().argmax(2)
    kinds, counts = orders.unique(dim=0, return_counts=True)
    assert len(kinds) == 6
    # Five standard deviations of a count are 102.
    assert (counts - 500).abs().max() < 102


def test_rendering():
    task = AssociativeRecall(pairs=2, key_symbols=KEYS, value_symbols=VALUES, length=9)
    tokens = torch.tensor([4, 9, 1, 6, NOISE, 1, NOISE, NOISE, 4])
    targets = torch.tensor([IGNORE] * 5 + [6, IGNORE, IGNORE, 9])
    predictions = torch.tensor([0] * 5 + [6, 0, 0, NOISE])
    assert task.render(tokens, targets, predictions).splitlines() == [
        "sequence  k4=v3 k1=v0 . k1 .. k4",
        "answer    v0 v3",
        "model     v0 .   1 of 2 right",
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"pairs": 5, "key_symbols": 4}, "pairs must be 1 to key_symbols = 4, got 5"),
        ({"pairs": 1.5}, "pairs must be an integer, got 1.5"),
        ({"key_symbols": True}, "key_symbols must be an integer, got True"),
        ({"value_symbols": 0}, "value_symbols must be at least 1, got 0"),
        ({"value_symbols": "3"}, "value_symbols must be an integer, got '3'"),
        ({"pairs": 5, "length": 14}, "length must be at least 3 · pairs = 15, got 14"),
        ({"length": 30.0}, "length must be an integer, got 30.0"),
        ({"power": 0}, r"power must be in \(0, 1\], got 0"),
        ({"power": 1.5}, r"power must be in \(0, 1\], got 1.5"),
        ({"power": float("nan")}, r"power must be in \(0, 1\], got nan"),
    ],
)
def test_refusals(options, part):
    with pytest.raises(TypeError if "integer" in part else ValueError, match=f"associative_recall: {part}"):
        AssociativeRecall(**options)
