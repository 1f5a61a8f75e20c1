"""Checkpoints: what they restore, what is kept, and what is done with a broken one."""

import errno
import json

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ssmscan.models import SSMForCausalLM, load_pretrained
from ssmscan.tasks import Copying
from ssmscan.training import ModelConfig, OptimConfig, checkpoint
from ssmscan.training.optim import make_optimizer


class Line(PreTrainedModel):
    """The smallest model that transformers saves."""

    config_class = PretrainedConfig

    def __init__(self, layers=1):
        super().__init__(PretrainedConfig())
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        self.post_init()

    def forward(self, x):
        return self.layers(x)


def _trained(steps):
    torch.manual_seed(0)
    model = Line()
    optimizer = make_optimizer(model, OptimConfig())
    for _ in range(steps):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _save(root, step, keep=3):
    model, optimizer = _trained(step)
    checkpoint.save(root, step, model, Copying(), optimizer, seconds=float(step), keep=keep)


def _weight(model):
    return model.layers[0].weight


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_restores_everything(tmp_path):
    model, optimizer = _trained(5)
    checkpoint.save(tmp_path, 5, model, Copying(), optimizer, 1.5, keep=1)
    drawn = torch.randn(3)
    other, other_optimizer = _trained(1)
    assert checkpoint.load(tmp_path, other, other_optimizer) == (5, 1.5)
    assert torch.equal(torch.randn(3), drawn)
    assert torch.equal(_weight(other), _weight(model))
    for state, expected in zip(other_optimizer.state.values(), optimizer.state.values(), strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_tied_weights(tmp_path):
    """One tensor under two names is written once, and both have it again."""

    def tied(seed):
        torch.manual_seed(seed)
        model = SSMForCausalLM(ModelConfig(mixers="gated_ssm", hidden_size=4).build(vocab_size=5))
        return model, make_optimizer(model, OptimConfig())

    model, optimizer = tied(0)
    checkpoint.save(tmp_path, 1, model, Copying(), optimizer, 0.0, keep=1)
    other, other_optimizer = tied(1)
    assert checkpoint.load(tmp_path, other, other_optimizer)[0] == 1
    for loaded in (other, load_pretrained(tmp_path / "step_00000001")):
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


def test_weights_of_another_model_are_refused(tmp_path):
    _save(tmp_path, 1)
    model = Line(layers=2)
    with pytest.raises(RuntimeError, match="Missing key"):
        checkpoint.load(tmp_path, model, make_optimizer(model, OptimConfig()))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path / "none", *_trained(0)) == (0, 0.0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.pt"])
def test_a_flipped_bit_is_found(tmp_path, name):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    _flip(tmp_path / "step_00000002" / name)
    model, optimizer = _trained(0)
    with pytest.warns(UserWarning, match=rf"step_00000002 is broken \({name} does not match its SHA-256\)"):
        assert checkpoint.load(tmp_path, model, optimizer)[0] == 1
    assert torch.equal(_weight(model), _weight(_trained(1)[0]))


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
        assert checkpoint.load(tmp_path, *_trained(0)) == (0, 0.0)


def test_a_broken_one_is_replaced(tmp_path):
    _save(tmp_path, 1)
    _flip(tmp_path / "step_00000001" / "training.pt")
    _save(tmp_path, 1)
    assert checkpoint.load(tmp_path, *_trained(0))[0] == 1


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    _save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
