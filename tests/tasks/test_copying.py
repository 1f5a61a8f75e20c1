"""Copying and selective copying: what an example is, the rendering, the refusals."""

import pytest
import torch

from ssmscan.tasks import IGNORE, Copying, SelectiveCopying

TASKS = (Copying, SelectiveCopying)


@pytest.mark.parametrize("task_class", TASKS)
def test_an_example(task_class):
    task = task_class(symbols=5, data_tokens=3, length=10)
    tokens, targets, _ = task.batch(64, seed=0, index=0, split="train")
    assert tokens.shape == targets.shape == (64, 13)
    assert tokens.dtype == targets.dtype == torch.int64
    assert task.vocab_size == 7
    before = tokens[:, :10]
    is_data = before < 5
    assert (before[~is_data] == 5).all()
    assert (is_data.sum(1) == 3).all()
    assert (tokens[:, 10:] == 6).all()
    assert (targets[:, :10] == IGNORE).all()
    # The answer is the data in their order.
    assert torch.equal(before[is_data].view(64, 3), targets[:, 10:])


def test_positions():
    first = torch.arange(10) < 3
    copying = Copying(5, 3, 10).batch(64, 0, 0, "train").tokens[:, :10] < 5
    assert (copying == first).all()


def test_every_set_of_places_is_equally_likely():
    data = SelectiveCopying(symbols=1, data_tokens=2, length=5).batch(20_000, 0, 0, "train").tokens[:, :5] == 0
    sets, counts = data.unique(dim=0, return_counts=True)
    assert len(sets) == 10
    # Five standard deviations of a count are 212.
    assert (counts - 2000).abs().max() < 212


@pytest.mark.parametrize("task_class", TASKS)
def test_mixed_lengths(task_class):
    task = task_class(symbols=5, data_tokens=3, length=20, shortest=5)
    batches = [task.batch(2, seed=0, index=i, split="train") for i in range(300)]
    lengths, counts = torch.tensor([batch.tokens.shape[1] for batch in batches]).unique(return_counts=True)
    assert lengths.tolist() == [5 + 3, 10 + 3, 20 + 3]
    # Five standard deviations are 41.
    assert (counts - 100).abs().max() < 41
    for tokens, targets, _ in batches:
        data = tokens[:, :-3]
        assert torch.equal(data[data < 5].view(2, 3), targets[:, -3:])
        assert (tokens[:, -3:] == 6).all()
    assert all(task.batch(2, 0, i, "eval").tokens.shape == (2, 23) for i in range(10))


def test_all_places_hold_data():
    tokens, targets, _ = SelectiveCopying(symbols=62, data_tokens=7, length=7).batch(4, 0, 0, "eval")
    assert torch.equal(tokens[:, :7], targets[:, 7:])


def test_rendering():
    task = Copying(symbols=4, data_tokens=3, length=5)
    tokens = torch.tensor([0, 3, 1, 4, 4, 5, 5, 5])
    targets = torch.tensor([IGNORE] * 5 + [0, 3, 1])
    predictions = torch.tensor([9] * 5 + [0, 3, 2])
    assert task.render(tokens, targets, predictions).splitlines() == [
        "sequence  ADB..",
        "answer    A D B",
        "model     A D C   2 of 3 right",
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((0, 1, 1), "copying: symbols must be at least 1, got 0"),
        ((63, 1, 1), "copying: symbols must be 1 to 62, got 63"),
        ((4, 9, 8), "copying: data_tokens must be 1 to length = 8, got 9"),
        ((4, 0, 8), "copying: data_tokens must be at least 1, got 0"),
        ((1.5, 1, 1), "copying: symbols must be an integer, got 1.5"),
        ((4, True, 8), "copying: data_tokens must be an integer, got True"),
        ((4, 1, "8"), "copying: length must be an integer, got '8'"),
    ],
)
def test_refusals(arguments, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=part):
        Copying(*arguments)


def test_a_long_sequence_is_shown_in_part():
    task = Copying(symbols=4, data_tokens=1, length=1000)
    tokens, targets, _ = task.batch(1, 0, 0, "eval")
    first, *others = task.render(tokens[0], targets[0], targets[0]).splitlines()
    assert first.endswith(f"{'.' * 59} … 880 more … {'.' * 60}")
    assert len(others) == 2
