"""Checkpoints: what they restore, what is kept, and what is done with a broken one."""

import json

import pytest
import torch
from torch import nn

from ssmscan.training import OptimConfig, checkpoint
from ssmscan.training.optim import make_optimizer


def _trained(steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig())
    for _ in range(steps):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _save(root, step, keep=3):
    checkpoint.save(root, step, *_trained(step), seconds=float(step), keep=keep)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_restores_everything(tmp_path):
    model, optimizer = _trained(5)
    checkpoint.save(tmp_path, 5, model, optimizer, 1.5, keep=1)
    drawn = torch.randn(3)
    other, other_optimizer = _trained(1)
    assert checkpoint.load(tmp_path, other, other_optimizer) == (5, 1.5)
    assert torch.equal(torch.randn(3), drawn)
    assert torch.equal(other.weight, model.weight)
    for state, expected in zip(other_optimizer.state.values(), optimizer.state.values(), strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_tied_weights(tmp_path):
    """One tensor under two names is written once, and both have it again."""

    def tied():
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        model["head"].weight = model["embedding"].weight
        return model, make_optimizer(model, OptimConfig())

    model, optimizer = tied()
    checkpoint.save(tmp_path, 1, model, optimizer, 0.0, keep=1)
    other, other_optimizer = tied()
    assert checkpoint.load(tmp_path, other, other_optimizer)[0] == 1
    assert torch.equal(other["head"].weight, model["head"].weight)
    assert other["head"].weight is other["embedding"].weight


def test_weights_of_another_model_are_refused(tmp_path):
    _save(tmp_path, 1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="Missing key"):
        checkpoint.load(tmp_path, model, make_optimizer(model, OptimConfig()))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path / "none", *_trained(0)) == (0, 0.0)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
def test_a_flipped_bit_is_found(tmp_path, name):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    _flip(tmp_path / "step_00000002" / name)
    model, optimizer = _trained(0)
    with pytest.warns(UserWarning, match=rf"step_00000002 is broken \({name} does not match its SHA-256\)"):
        assert checkpoint.load(tmp_path, model, optimizer)[0] == 1
    assert torch.equal(model.weight, _trained(1)[0].weight)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"sha256": {}})), "is not readable"),
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
        raise OSError("No space left on device")

    _save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
