"""Copying and selective copying: what an example is, seeds and streams, the metric, the rendering."""

import pytest
import torch

from ssmscan.tasks import IGNORE, Copying, SelectiveCopying, cross_entropy

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
    scattered = SelectiveCopying(5, 3, 10).batch(2000, 0, 0, "train").tokens[:, :10] < 5
    # Each position holds data in 3 of 10 examples.
    assert (scattered.double().mean(0) - 0.3).abs().max() < 0.05


@pytest.mark.parametrize("task_class", TASKS)
def test_streams(task_class):
    task = task_class()
    batch = task.batch(8, seed=3, index=5, split="train")
    again = task_class().batch(8, seed=3, index=5, split="train")
    assert torch.equal(batch.tokens, again.tokens)
    assert torch.equal(batch.targets, again.targets)
    for seed, index, split in ((3, 5, "eval"), (3, 6, "train"), (4, 5, "train")):
        assert not torch.equal(batch.tokens, task.batch(8, seed, index, split).tokens)


def test_no_evaluation_example_is_trained_on():
    task = SelectiveCopying()
    seen = {
        split: {tuple(row) for i in range(20) for row in task.batch(64, 0, i, split).tokens.tolist()}
        for split in ("train", "eval")
    }
    assert len(seen["train"]) == len(seen["eval"]) == 20 * 64
    assert not seen["train"] & seen["eval"]


def test_answer_tokens_alone_are_measured():
    targets = torch.tensor([[IGNORE, 1, 2, 0]])
    logits = torch.eye(3)[torch.tensor([[0, 1, 2, 2]])]
    measures = Copying().measure(logits, targets)
    assert measures["accuracy"] == (2, 3)
    likely, other = torch.eye(3)[0].log_softmax(0)[:2].tolist()
    assert measures["loss"] == (pytest.approx(-2 * likely - other), 3)
    assert cross_entropy(logits, targets).item() == pytest.approx((-2 * likely - other) / 3)


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
