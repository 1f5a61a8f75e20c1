"""What the synthetic tasks have in common: seeds and streams, the metrics, and that every mixer learns."""

import math
from dataclasses import replace

import pytest
import torch

from ssmscan.models import SSMConfig, SSMForCausalLM
from ssmscan.models.mixers import MIXERS
from ssmscan.tasks import (
    IGNORE,
    TASKS,
    AssociativeRecall,
    Copying,
    InductionHeads,
    SelectiveCopying,
    cross_entropy,
)

SMALL = {
    "copying": Copying(symbols=5, data_tokens=3, length=10),
    "selective_copying": SelectiveCopying(symbols=5, data_tokens=3, length=10),
    "induction_heads": InductionHeads(symbols=5, length=12, shortest=5, test_lengths=(9,), test_examples=2),
    "associative_recall": AssociativeRecall(pairs=2, key_symbols=4, value_symbols=3, length=12),
}
OPTIONS = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 4},
    "hydra": {"d_state": 4, "headdim": 4},
    "matrix_ssm": {"d_state": 4, "headdim": 4},
    "s4d": {"d_state": 4},
    "rg_lru": {"num_heads": 2},
    "attention": {"num_heads": 2},
}

all_tasks = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL)


def test_all_synthetic_tasks_are_here():
    assert SMALL.keys() == TASKS.keys() - {"text"}


def model_for(task, mixer):
    torch.manual_seed(0)
    options = {mixer: OPTIONS[mixer]} if mixer in OPTIONS else {}
    return SSMForCausalLM(
        SSMConfig(vocab_size=task.vocab_size, hidden_size=8, mixers=[mixer, mixer], mixer_options=options)
    )


@all_tasks
def test_streams(task):
    tokens, targets, starts = task.batch(8, seed=3, index=5, split="train")
    again = replace(task).batch(8, seed=3, index=5, split="train")
    assert torch.equal(tokens, again.tokens)
    assert torch.equal(targets, again.targets)
    assert starts is None
    assert tokens.dtype == targets.dtype == torch.int64
    for seed, index, split in ((3, 5, "eval"), (3, 6, "train"), (4, 5, "train")):
        assert not torch.equal(tokens, task.batch(8, seed, index, split).tokens)


@pytest.mark.parametrize(
    "task",
    [SelectiveCopying(), Copying(data_tokens=16), InductionHeads(length=64), AssociativeRecall()],
    ids=lambda task: task.name,
)
def test_no_evaluation_example_is_trained_on(task):
    seen = {
        split: {tuple(row) for i in range(10) for row in task.batch(64, 0, i, split).tokens.tolist()}
        for split in ("train", "eval")
    }
    assert len(seen["train"]) == len(seen["eval"]) == 10 * 64
    assert not seen["train"] & seen["eval"]


@all_tasks
def test_sizes(task):
    tokens, targets, _ = task.batch(3, seed=0, index=0, split="eval")
    assert tokens.shape == targets.shape == (3, task.example_length)
    assert tokens.min() >= 0
    assert tokens.max() == task.vocab_size - 1
    answers = targets[targets != IGNORE]
    assert answers.min() >= 0
    assert answers.max() < task.vocab_size


def test_answer_tokens_alone_are_measured():
    targets = torch.tensor([[IGNORE, 1, 2, 0]])
    logits = torch.eye(3)[torch.tensor([[0, 1, 2, 2]])]
    measures = Copying().measure(logits, targets)
    assert measures["accuracy"] == (2, 3)
    likely, other = torch.eye(3)[0].log_softmax(0)[:2].tolist()
    assert measures["loss"] == (pytest.approx(-2 * likely - other), 3)
    assert cross_entropy(logits, targets).item() == pytest.approx((-2 * likely - other) / 3)


@all_tasks
def test_an_untrained_model_guesses(task):
    tokens, targets, _ = task.batch(256, seed=0, index=0, split="eval")
    with torch.no_grad():
        measures = task.measure(model_for(task, "mamba2")(tokens).logits, targets)
    loss = measures["loss"].total / measures["loss"].answers
    assert abs(loss - math.log(task.vocab_size)) < 0.1
    # No symbol or value is right more often than one time in three, but for chance.
    assert measures["accuracy"].total < (1 / 3 + 0.1) * measures["accuracy"].answers


@all_tasks
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains(task, mixer):
    """On one batch again and again, in a few steps, the loss falls."""
    model = model_for(task, mixer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens, targets, _ = task.batch(4, seed=0, index=0, split="train")
    losses = []
    for _ in range(5):
        loss = cross_entropy(model(tokens).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
