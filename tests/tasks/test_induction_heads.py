"""Induction heads: what an example is, mixed lengths, the examination, the rendering, the refusals."""

import json
from pathlib import Path

import pytest
import torch

from ssmscan import cli
from ssmscan.models import SSMConfig, SSMForCausalLM
from ssmscan.tasks import IGNORE, InductionHeads, induction_heads

SPECIAL = 5


@pytest.mark.parametrize("length", [3, 4, 12])
def test_an_example(length):
    tokens, targets, _ = InductionHeads(symbols=SPECIAL, length=length).batch(200, seed=0, index=0, split="train")
    assert tokens.shape == targets.shape == (200, length)
    special = tokens == SPECIAL
    assert (special.sum(1) == 2).all()
    assert special[:, -1].all()
    places = special.int().argmax(1)
    assert set(places.tolist()) == set(range(length - 2))
    assert (targets[:, :-1] == IGNORE).all()
    assert torch.equal(targets[:, -1], tokens[torch.arange(200), places + 1])
    assert set(targets[:, -1].tolist()) == set(range(SPECIAL))


def test_mixed_lengths():
    task = InductionHeads(symbols=SPECIAL, length=44, shortest=5)
    batches = [task.batch(2, seed=0, index=i, split="train") for i in range(400)]
    lengths, counts = torch.tensor([batch.tokens.shape[1] for batch in batches]).unique(return_counts=True)
    assert lengths.tolist() == [5, 11, 22, 44]
    # Five standard deviations are 43.
    assert (counts - 100).abs().max() < 43
    assert all((batch.tokens[:, -1] == SPECIAL).all() and (batch.targets[:, -1] < SPECIAL).all() for batch in batches)
    assert all(task.batch(2, 0, i, "eval").tokens.shape == (2, 44) for i in range(10))
    same = InductionHeads(symbols=SPECIAL, length=44, shortest=23)
    assert all(same.batch(2, 0, i, "train").tokens.shape == (2, 44) for i in range(10))


class _Oracle:
    """A model that answers right, and remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self):
        self.pieces = []

    def eval(self):
        return self

    def make_cache(self, batch_size, max_length):
        self.pieces.append([])
        return self.pieces[-1]

    def __call__(self, tokens, cache, logits_to_keep):
        cache.append(tokens)
        whole = torch.cat(cache, 1)
        first = (whole == SPECIAL).int().argmax(1)
        answers = whole.gather(1, (first + 1).clamp(max=whole.shape[1] - 1).unsqueeze(1))
        return type("Output", (), {"logits": torch.nn.functional.one_hot(answers, SPECIAL + 1)})


@pytest.mark.parametrize("at_a_time", [4, 28, 2**15])
def test_examination(monkeypatch, at_a_time):
    """Every length is asked once, in pieces, with other sequences than training and evaluation have."""
    monkeypatch.setattr(induction_heads, "_AT_A_TIME", at_a_time)
    task = InductionHeads(symbols=SPECIAL, length=16, test_lengths=(16, 30), test_examples=4)
    model = _Oracle()
    assert task.examine(model, seed=0) == {"accuracy_at_16": (4, 4), "accuracy_at_30": (4, 4)}
    for length, pieces in zip((16, 30), model.pieces, strict=True):
        whole = torch.cat(pieces, 1)
        assert whole.shape == (4, length)
        assert max(piece.numel() for piece in pieces) <= at_a_time
        assert len(pieces) == -(-length // (at_a_time // 4))
        assert ((whole == SPECIAL).sum(1) == 2).all()
        assert (whole[:, -1] == SPECIAL).all()
    asked = {tuple(row) for row in torch.cat(model.pieces[0], 1).tolist()}
    for split in ("train", "eval"):
        assert not asked & {tuple(row) for i in range(20) for row in task.batch(64, 0, i, split).tokens.tolist()}


def test_wrong_answers_are_counted():
    class Wrong(_Oracle):
        def __call__(self, tokens, cache, logits_to_keep):
            output = super().__call__(tokens, cache, logits_to_keep)
            output.logits[0] = output.logits[0].roll(1)
            return output

    task = InductionHeads(symbols=SPECIAL, test_lengths=(16,), test_examples=4)
    assert task.examine(Wrong(), seed=0) == {"accuracy_at_16": (3, 4)}


@pytest.mark.parametrize("mixer", ["gated_ssm", "matrix_ssm", "s4d", "mamba", "mamba2", "rg_lru", "attention"])
def test_pieces_change_no_answer(monkeypatch, mixer):
    """The last logits are those of the whole sequence at once, and the model's parameters and mode stay."""
    monkeypatch.setattr(induction_heads, "_AT_A_TIME", 15)
    options = {"rg_lru": {"num_heads": 2}, "attention": {"num_heads": 2}, "mamba2": {"headdim": 4}}
    options |= {"matrix_ssm": {"headdim": 4}}
    torch.manual_seed(0)
    model = SSMForCausalLM(
        SSMConfig(
            vocab_size=SPECIAL + 1,
            hidden_size=8,
            mixers=[mixer, mixer],
            mixer_options={mixer: options[mixer]} if mixer in options else {},
            initializer_range=1.0,
        )
    ).double()
    calls = []
    model.register_forward_hook(lambda _, arguments, output: calls.append((arguments[0], output.logits)))
    task = InductionHeads(symbols=SPECIAL, test_lengths=(22,), test_examples=3)
    measures = task.examine(model, seed=0)
    whole = torch.cat([tokens for tokens, _ in calls], 1)
    last = calls[-1][1][:, -1]
    assert [tokens.shape[1] for tokens, _ in calls] == [5, 5, 5, 5, 2]
    assert not last.requires_grad
    with torch.no_grad():
        expected = model(whole, use_cache=False).logits[:, -1]
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)
    places = (whole == SPECIAL).int().argmax(1)
    answers = whole[torch.arange(3), places + 1]
    assert measures == {"accuracy_at_22": ((expected.argmax(-1) == answers).sum(), 3)}


def test_a_model_without_a_state_is_not_examined():
    options = {"hydra": {"headdim": 4, "d_state": 4}}
    model = SSMForCausalLM(SSMConfig(vocab_size=6, hidden_size=8, mixers=["hydra"], mixer_options=options))
    with pytest.warns(UserWarning, match="induction_heads: no examination. Hydra: state must be None"):
        assert InductionHeads(symbols=SPECIAL).examine(model, seed=0) == {}
    assert InductionHeads(symbols=SPECIAL, test_lengths=()).examine(model, seed=0) == {}


def test_rendering():
    tokens, targets = torch.tensor([0, 3, 5, 2, 1, 5]), torch.tensor([IGNORE] * 5 + [2])
    task = InductionHeads(symbols=SPECIAL, length=6)
    assert task.render(tokens, targets, torch.tensor([0] * 5 + [5])).splitlines() == [
        "sequence  AD?CB?",
        "answer    C",
        "model     ?   0 of 1 right",
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"symbols": 0}, "symbols must be at least 1, got 0"),
        ({"symbols": 63}, "symbols must be 1 to 62, got 63"),
        ({"symbols": 1.5}, "symbols must be an integer, got 1.5"),
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"length": "8"}, "length must be an integer, got '8'"),
        ({"shortest": 2}, "shortest must be at least 3, got 2"),
        ({"shortest": 9, "length": 8}, "shortest must be at most length = 8, got 9"),
        ({"shortest": True}, "shortest must be an integer, got True"),
        ({"test_lengths": (64, 2)}, "test_lengths must be at least 3, got 2"),
        ({"test_lengths": (6.4,)}, "test_lengths must be an integer, got 6.4"),
        ({"test_lengths": 64}, "test_lengths must be a tuple of integers, got 64"),
        ({"test_examples": 0}, "test_examples must be at least 1, got 0"),
        ({"test_examples": 2.0}, "test_examples must be an integer, got 2.0"),
    ],
)
def test_refusals(options, part):
    with pytest.raises(TypeError if "integer" in part else ValueError, match=f"induction_heads: {part}"):
        InductionHeads(**options)


def test_a_run_writes_its_examination_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(
        "{steps: 2, batch_size: 2, eval_tokens: 8, out: run, device: cpu, optim: {warmup: 1}, "
        "task: {name: induction_heads, symbols: 3, length: 8, shortest: 4, test_lengths: [8, 20], test_examples: 4}, "
        "model: {mixers: gated_ssm, layers: 1, hidden_size: 4, mixer_options: {gated_ssm: {expand: 1}}}}"
    )
    assert cli.main(["train", "--config", "tiny.yaml"]) == 0
    examination = json.loads(Path("run/metrics.json").read_text())["examination"]
    assert examination.keys() == {"accuracy_at_8", "accuracy_at_20"}
    assert all(accuracy in (0, 0.25, 0.5, 0.75, 1) for accuracy in examination.values())
    assert cli.main(["train", "--config", "run/config.yaml", "--out", "again", "--task.test_lengths", "[]"]) == 0
    assert json.loads(Path("again/metrics.json").read_text())["examination"] == {}
