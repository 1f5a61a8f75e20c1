"""Parameter groups and the learning rate."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ssmscan.layers import Mamba2
from ssmscan.training import OptimConfig
from ssmscan.training.optim import learning_rate, make_optimizer


def test_what_decays():
    """What the layers say by name; the names themselves are tested there."""
    model = Mamba2(8, d_state=4, headdim=4)
    decayed, kept = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert [group["weight_decay"] for group in (decayed, kept)] == [0.3, 0.0]
    assert {names[id(p)] for p in decayed["params"]} == {"in_proj.weight", "conv1d.weight", "out_proj.weight"}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert kept_names == {"conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"}


def test_parameters_in_shares(tmp_path, monkeypatch):
    """Are updated as whole ones are, to the bit, by no operation on DTensors; the moments are shares too."""
    seen, update = set(), torch._fused_adamw_

    def watched(parameters, *others, **named):
        seen.update(type(tensor) for tensors in (parameters, *others) for tensor in tensors)
        return update(parameters, *others, **named)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    whole, shared = (Mamba2(8, d_state=4, headdim=4) for _ in range(2))
    shared.load_state_dict(whole.state_dict())
    fully_shard(shared, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
    for model in (whole, shared):
        optimizer = make_optimizer(model, OptimConfig())
        for _ in range(3):
            model(torch.ones(1, 3, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(whole.parameters(), shared.parameters(), strict=True):
        assert torch.equal(other.full_tensor(), one)
        assert isinstance(optimizer.state[other]["exp_avg"], DTensor)
    assert seen == {nn.Parameter, torch.Tensor}
    dist.destroy_process_group()


def test_learning_rate():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup=4)
    rates = [learning_rate(step, 21, config) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.55)  # half way down
    assert rates[20] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert learning_rate(0, 1, OptimConfig(lr=1.0, warmup=0)) == 1.0


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"min_lr": 1.0}, "min_lr must be 0 to lr = 0.002, got 1.0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"warmup": 1.5}, "warmup must be an integer, got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
    ],
)
def test_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=f"optim: {part}"):
        OptimConfig(**keywords)


def test_a_model_can_be_trained():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    for _ in range(100):
        loss = (model(torch.ones(1, 2)) - 3).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
