"""Parameters: their names, what they keep by every road, what is not decayed, and devices and dtypes to start on."""

import copy
import pickle

import pytest
import torch
from layer_table import LAYERS, B, L, M, build
from torch import nn

from ssmscan import layers

WIDE = {
    "gated_ssm": {"decay_bias", "input_bias"},
    "matrix_ssm": {"decay_bias", "norm.weight"},
    "s4d": {"A_log", "A_imag", "C", "D", "log_dt"},
    "s4d_real": {"A_log", "C", "D", "log_dt"},
    "mamba": {"A_log", "D", "dt_proj.bias"},
    "mamba2": {"A_log", "D", "dt_bias", "norm.weight"},
    "hydra": {"A_log", "D", "dt_bias", "norm.weight"},
    "rg_lru": {"a_param", "input_gate.bias", "recurrence_gate.bias"},
    "attention": set(),
}
ROADS = {
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "to": lambda layer: layer.to(torch.bfloat16),
    "in a model": lambda layer: nn.Sequential(layer).to(torch.bfloat16)[0],
    "after deepcopy": lambda layer: copy.deepcopy(layer).bfloat16(),
    "after pickle": lambda layer: pickle.loads(pickle.dumps(layer)).bfloat16(),
}


def narrow_state(layer):
    return {name: p.bfloat16() for name, p in layer.state_dict().items()}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", WIDE)
def test_conversions_keep_some_wide(name, road):
    layer = build(name, torch.float32)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    layer = ROADS[road](layer)
    assert {name for name, p in layer.named_parameters() if p.dtype is torch.float32} == WIDE[name]
    for path in WIDE[name]:
        p = layer.get_parameter(path)
        assert torch.equal(p, before[path])
        assert p.grad is None or p.grad.dtype is torch.float32
    assert layer.double().state_dict().keys() == before.keys()
    assert {p.dtype for p in layer.double().parameters()} == {torch.float64}
    assert {p.dtype for p in layer.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_loading_keeps_some_wide(name, assign):
    layer = build(name, torch.float32).bfloat16()
    given = narrow_state(layer)
    given_before = dict(given)
    nn.Sequential(layer).load_state_dict({f"0.{name}": p for name, p in given.items()}, assign=assign)
    assert given == given_before
    assert {name for name, p in layer.named_parameters() if p.dtype is torch.float32} == WIDE[name]
    assert all(torch.equal(p.bfloat16(), given[name]) for name, p in layer.named_parameters())
    if name != "hydra":
        state = layer.init_state(B, max_length=1)
        with torch.no_grad():
            layer(torch.randn(B, 1, M, dtype=torch.bfloat16), state)


def test_wide_parameters_are_still_strict():
    layer = build("mamba")
    state = layer.state_dict()
    del state["A_log"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"A_log\""):
        layer.load_state_dict(state)


def test_states_are_wide():
    assert build("mamba", torch.bfloat16).init_state(1).scan.dtype is torch.float32
    assert build("mamba").init_state(1).scan.dtype is torch.float64
    assert build("s4d", torch.bfloat16).init_state(1).scan.dtype is torch.complex64
    assert build("s4d").init_state(1).scan.dtype is torch.complex128
    # The keys and values are not sums.
    assert build("attention", torch.bfloat16).init_state(1, max_length=2).keys.dtype is torch.bfloat16


DECAYED = {
    "gated_ssm": {"in_proj.weight", "out_proj.weight"},
    "matrix_ssm": {"in_proj.weight", "out_proj.weight"},
    "s4d": {"C", "out_proj.weight"},
    "mamba": {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
    "mamba2": {"in_proj.weight", "conv1d.weight", "out_proj.weight"},
    "hydra": {"in_proj.weight", "conv1d.weight", "fc_D.weight", "out_proj.weight"},
    "rg_lru": {"in_proj.weight", "conv1d.weight", "input_gate.weight", "recurrence_gate.weight", "out_proj.weight"},
    "attention": {"in_proj.weight", "out_proj.weight"},
}


@pytest.mark.parametrize("how", [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", DECAYED)
def test_what_decays(name, how):
    layer = how(build(name))
    names = {id(p): name for name, p in layer.named_parameters()}
    decayed, kept = layers.decay_groups(layer)
    assert {names[id(p)] for p in decayed} == DECAYED[name]
    assert {names[id(p)] for p in kept} == set(names.values()) - DECAYED[name]


def test_what_decays_in_a_model():
    """Shared parameters come once, frozen ones not at all."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, M), "norm": nn.LayerNorm(M), "head": nn.Linear(M, 5)})
    model.head.weight = model.embedding.weight
    model.frozen = nn.Linear(M, M).requires_grad_(False)
    decayed, kept = layers.decay_groups(model)
    assert [id(p) for p in decayed] == [id(model.head.weight)]
    assert {id(p) for p in kept} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}


@pytest.mark.parametrize("name", LAYERS)
def test_meta(name):
    """A layer that was made without memory starts as one that was made with it."""
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    other = LAYERS[name]()
    for each in (layer, other):
        torch.manual_seed(3)
        each.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_another_default_device_and_dtype(name, request):
    """What a layer makes for itself is where its parameters and inputs are."""
    layer = build(name, torch.float32)
    x = torch.randn(B, L, M)
    mask = torch.ones(B, L, dtype=torch.bool)
    expected = layer(x, mask=mask)

    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(layer(x, mask=mask), expected)
    assert {p.dtype for p in LAYERS[name]().parameters()} <= {torch.bfloat16, torch.float32}
    with torch.device("meta"):
        if getattr(layer, "causal", True):
            state = layer.init_state(B, max_length=L)
            assert not any(tensor.is_meta for tensor in state)
            torch.testing.assert_close(layer(x, state, mask=mask), expected)
            layers.reorder(state, torch.zeros(B, dtype=torch.int64, device="cpu"))
        assert torch.equal(layer(x, mask=mask), expected)


def test_factory_arguments():
    for make in LAYERS.values():
        layer = make(device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta for p in layer.parameters())
        assert layer.out_proj.weight.dtype is torch.bfloat16
    for module in (layers.MLP(4, 8, device="meta"), layers.RMSNorm(4, device="meta")):
        assert all(p.is_meta for p in module.parameters())


def test_names_of_the_checkpoints():
    """Names and shapes, by which published weights are read."""
    e, n, r = 16, 3, 1
    assert {name: tuple(p.shape) for name, p in build("mamba").named_parameters()} == {
        "in_proj.weight": (2 * e, M),
        "conv1d.weight": (e, 1, 4),
        "conv1d.bias": (e,),
        "x_proj.weight": (r + 2 * n, e),
        "dt_proj.weight": (e, r),
        "dt_proj.bias": (e,),
        "A_log": (e, n),
        "D": (e,),
        "out_proj.weight": (M, e),
    }
    g, h = 2, 4
    assert {name: tuple(p.shape) for name, p in build("mamba2").named_parameters()} == {
        "in_proj.weight": (2 * e + 2 * g * n + h, M),
        "conv1d.weight": (e + 2 * g * n, 1, 4),
        "conv1d.bias": (e + 2 * g * n,),
        "dt_bias": (h,),
        "A_log": (h,),
        "D": (h,),
        "norm.weight": (e,),
        "out_proj.weight": (M, e),
    }


@pytest.mark.parametrize("name", LAYERS)
def test_narrow_parameters_all_the_same(name):
    """A library that gathers parameters in bfloat16, as FSDP does, narrows all of them, whatever a layer wants."""
    layer = build(name, torch.float32)
    x = torch.randn(B, L, M)
    exact = layer(x)
    for p in layer.parameters():
        p.data = p.data.bfloat16()
    y = layer(x.bfloat16())
    assert (y.float() - exact).norm() < 2e-2 * exact.norm()
    if getattr(layer, "causal", True):
        state = layer.init_state(B, max_length=1)
        with torch.no_grad():
            layer(x[:, :1].bfloat16(), state)
