"""What layers start from."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmscan.layers import RGLRU, S4D, GatedSSM, Hydra, Mamba, Mamba2, MatrixSSM
from ssmscan.ops import s4d_lin, s4d_real


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def evenly(values, low, high):
    """Values are spread evenly from low to high: each third holds a third of them."""
    assert values.min() >= low - 1e-3
    assert values.max() <= high + 1e-3
    counts = torch.histc(values.float(), bins=3, min=low - 2e-3, max=high + 2e-3)
    return (counts / values.numel() - 1 / 3).abs().max()


def steps_of(layer):
    bias = layer.dt_proj.bias if isinstance(layer, Mamba) else layer.dt_bias
    return F.softplus(bias.double())


@pytest.mark.parametrize("make", [Mamba, Mamba2, Hydra])
def test_step_sizes(make):
    layer = make(1024, **({} if make is Mamba else {"headdim": 2}))
    assert evenly(steps_of(layer).log(), math.log(1e-3), math.log(0.1)) < 0.05
    layer = make(64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=3e-4)
    torch.testing.assert_close(steps_of(layer), torch.full_like(steps_of(layer), 3e-4), rtol=1e-4, atol=0)


def test_mamba():
    layer = Mamba(64, d_state=16)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1, 17.0).expand(128, 16))
    assert (layer.D == 1).all()
    assert layer.dt_proj.weight.abs().max() <= 0.5
    assert evenly(layer.dt_proj.weight, -0.5, 0.5) < 0.1
    assert evenly(layer.conv1d.weight, -0.5, 0.5) < 0.1
    assert evenly(layer.conv1d.bias, -0.5, 0.5) < 0.1
    assert evenly(layer.in_proj.weight, -(64**-0.5), 64**-0.5) < 0.05


def test_mamba2():
    layer = Mamba2(1024, headdim=2)
    assert evenly(layer.A_log.exp(), 1, 16) < 0.05
    assert (layer.D == 1).all()
    assert (layer.norm.weight == 1).all()
    layer = Mamba2(64, A_init_range=(2.0, 2.0))
    torch.testing.assert_close(layer.A_log.exp(), torch.full((2,), 2.0))


def test_rg_lru():
    layer = RGLRU(4096, num_heads=512)
    a = torch.exp(-F.softplus(layer.a_param.double()))
    assert evenly(a.square(), 0.9**2, 0.999**2) < 0.05
    assert layer.input_gate.weight.std().item() == pytest.approx(0.1 / 8**0.5, rel=0.05)
    assert layer.in_proj.weight.std().item() == pytest.approx(1 / 64, rel=0.01)
    assert layer.conv1d.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert all((p == 0).all() for name, p in layer.named_parameters() if name.endswith("bias"))


def test_s4d():
    lin, real = S4D(512, d_state=8), S4D(512, d_state=8, poles="real")
    torch.testing.assert_close(lin.system()["A"], s4d_lin(512, 4))
    torch.testing.assert_close(real.system()["A"], s4d_real(512, 8))
    for layer in (lin, real):
        system = layer.system()
        assert evenly(system["dt"].log(), math.log(1e-3), math.log(0.1)) < 0.1
        assert system["C"].abs().square().mean().item() == pytest.approx(1, rel=0.1)
        assert (system["D"] == 1).all()
        assert (system["B"] == 1).all()


@pytest.mark.parametrize(
    "layer",
    [GatedSSM(64), MatrixSSM(64, d_state=256), GatedSSM(64, memory=(2.0, 5.0))],
    ids=["gated", "matrix", "short"],
)
def test_memories_are_spread_evenly_in_the_logarithm(layer):
    log_a = F.logsigmoid(layer.decay_bias.double())
    tau = (-1 / log_a).log10()
    shortest, longest = (math.log10(tau) for tau in layer.memory)
    assert tau.min().item() == pytest.approx(shortest, abs=1e-4)
    assert tau.max().item() == pytest.approx(longest, abs=1e-3)
    assert evenly(tau, shortest, longest) < 0.01
    if isinstance(layer, GatedSSM):
        a, b = log_a.exp(), torch.sigmoid(layer.input_bias.double())
        torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a), rtol=0, atol=1e-6)


def test_every_channel_starts_with_the_same_variance():
    """Whatever its memory: the input gate makes up for it."""
    layer = GatedSSM(16, expand=8, memory=(1.0, 100.0))
    state = layer.init_state(256)
    with torch.no_grad():
        # Without input-dependent gates, as at the centre of the distribution of inputs.
        layer.in_proj.weight[layer.d_inner :].zero_()
        layer(torch.randn(256, 400, 16), state)
    std = state.scan.std(0) / layer.in_proj.weight[: layer.d_inner].norm(dim=1)
    assert std.min() > 0.7
    assert std.max() < 1.4


def test_every_row_starts_with_the_same_variance():
    layer = MatrixSSM(16, d_state=32, headdim=16, memory=(1.0, 100.0))
    state = layer.init_state(256)
    with torch.no_grad():
        layer.in_proj.weight[-layer.rows :].zero_()
        layer(torch.randn(256, 400, 16), state)
    # Around its mean: keys and values are of the same token, and not independent.
    std = state.scan.var(0).mean(1).sqrt()
    std = std / layer.in_proj.weight[2 * layer.d_inner : 2 * layer.d_inner + layer.rows].norm(dim=1)
    assert (std / std.mean() - 1).abs().max() < 0.3


def test_decay_is_never_rounded_to_one():
    """A channel which remembers for a million tokens still forgets in bfloat16."""
    layer = GatedSSM(6, memory=(1e6, 1e6)).bfloat16()
    layer.in_proj.weight.data.zero_()
    state = layer.init_state(1)
    state.scan.fill_(1.0)
    with torch.no_grad():
        layer(torch.zeros(1, 1000, 6, dtype=torch.bfloat16), state)
    torch.testing.assert_close(state.scan, torch.full_like(state.scan, math.exp(-1e-3)), rtol=1e-4, atol=0)


def test_a_row_that_forgets_nothing_has_a_finite_gradient():
    layer = MatrixSSM(4, d_state=2, headdim=2)
    with torch.no_grad():
        layer.decay_bias.fill_(300.0)
    layer(torch.randn(1, 5, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
