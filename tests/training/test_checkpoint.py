"""Checkpoints: what they restore, what is kept, and what is done with a broken one."""

import errno
import json

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ssmscan.models import SSMForCausalLM, load_pretrained
from ssmscan.tasks import Copying
from ssmscan.training import ModelConfig, OptimConfig, TrainConfig, checkpoint
from ssmscan.training.optim import make_optimizer
from ssmscan.training.step import Step


class Line(PreTrainedModel):
    """The smallest model that transformers saves."""

    config_class = PretrainedConfig

    def __init__(self, layers=1):
        super().__init__(PretrainedConfig())
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        self.post_init()

    def forward(self, x):
        return self.layers(x)


def _trained(steps, layers=1):
    torch.manual_seed(0)
    model = Line(layers)
    optimizer = make_optimizer(model, OptimConfig())
    for _ in range(steps):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return Step(model, optimizer, TrainConfig(), torch.device("cpu"))


def _save(root, step, keep=3):
    checkpoint.save(root, step, _trained(step), Copying(), seconds=float(step), keep=keep)


def _weight(update):
    return update.model.layers[0].weight


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_restores_everything(tmp_path):
    update = _trained(5)
    checkpoint.save(tmp_path, 5, update, Copying(), 1.5, keep=1)
    drawn = torch.randn(3)
    other = _trained(1)
    assert checkpoint.load(tmp_path, other) == (5, 1.5)
    assert torch.equal(torch.randn(3), drawn)
    assert torch.equal(_weight(other), _weight(update))
    # The rate stays the one tensor that a recorded step reads.
    assert all(group["lr"] is other.rate for group in other.optimizer.param_groups)
    for state, expected in zip(other.optimizer.state.values(), update.optimizer.state.values(), strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_tied_weights(tmp_path):
    """One tensor under two names is written once, and both have it again."""

    def tied(seed):
        torch.manual_seed(seed)
        model = SSMForCausalLM(ModelConfig(mixers="gated_ssm", hidden_size=4).build(vocab_size=5))
        return Step(model, make_optimizer(model, OptimConfig()), TrainConfig(), torch.device("cpu"))

    update, other = tied(0), tied(1)
    checkpoint.save(tmp_path, 1, update, Copying(), 0.0, keep=1)
    assert checkpoint.load(tmp_path, other)[0] == 1
    for loaded in (other.model, load_pretrained(tmp_path / "step_00000001")):
        assert torch.equal(loaded.lm_head.weight, update.model.lm_head.weight)
        assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


def test_weights_of_another_model_are_refused(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        checkpoint.load(tmp_path, _trained(0, layers=2))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path / "none", _trained(0)) == (0, 0.0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.pt"])
def test_a_flipped_bit_is_found(tmp_path, name):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    _flip(tmp_path / "step_00000002" / name)
    update = _trained(0)
    with pytest.warns(UserWarning, match=rf"step_00000002 is broken \({name} does not match its SHA-256\)"):
        assert checkpoint.load(tmp_path, update)[0] == 1
    assert torch.equal(_weight(update), _weight(_trained(1)))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"sha256": []})), "is not readable"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"sha256": {}})), "is not complete"),
        (lambda folder: (folder / "training.pt").unlink(), "training.pt is missing"),
    ],
)
def test_an_incomplete_one_is_passed_over(tmp_path, spoil, part):
    _save(tmp_path, 1)
    spoil(tmp_path / "step_00000001")
    with pytest.warns(UserWarning, match=part):
        assert checkpoint.load(tmp_path, _trained(0)) == (0, 0.0)


def test_a_broken_one_is_replaced(tmp_path):
    _save(tmp_path, 1)
    _flip(tmp_path / "step_00000001" / "training.pt")
    _save(tmp_path, 1)
    assert checkpoint.load(tmp_path, _trained(0))[0] == 1


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    _save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
