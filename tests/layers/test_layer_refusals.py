"""What layers refuse, and how."""

import pytest
import torch
from layer_table import BOTH_SIDES, LAYERS, PACKED, B, L, M, build

from ssmscan import layers
from ssmscan.layers import MLP, RGLRU, S4D, Attention, GatedSSM, Hydra, Mamba, Mamba2, MatrixSSM


@pytest.mark.parametrize(
    ("make", "keywords", "part"),
    [
        (GatedSSM, {"d_model": 0}, "d_model must be a positive integer, got 0"),
        (GatedSSM, {"d_model": 4, "expand": 1.5}, "expand must be a positive integer, got 1.5"),
        (GatedSSM, {"d_model": 4, "expand": True}, "expand must be a positive integer, got True"),
        (GatedSSM, {"d_model": 4, "memory": (0.0, 1.0)}, "memory must be"),
        (MatrixSSM, {"d_model": 4, "headdim": 2, "memory": (9.0, 1.0)}, "memory must be"),
        (MatrixSSM, {"d_model": 4, "headdim": 3}, r"headdim must divide expand \* d_model = 4, got 3"),
        (S4D, {"d_model": 4, "d_state": 3}, "d_state must be even"),
        (S4D, {"d_model": 4, "poles": "circle"}, 'poles must be "lin" or "real"'),
        (S4D, {"d_model": 4, "dt_min": 1.0}, "dt_min and dt_max must be positive and in order, got 1.0 and 0.1"),
        (Mamba, {"d_model": 4, "dt_rank": 0}, "dt_rank must be a positive integer, got 0"),
        (Mamba, {"d_model": 4, "dt_init_floor": 0.0}, "dt_init_floor must be positive"),
        (Mamba2, {"d_model": 4, "headdim": 3}, r"headdim must divide expand \* d_model = 8, got 3"),
        (Mamba2, {"d_model": 4, "headdim": 2, "ngroups": 3}, "ngroups must divide the 4 heads, got 3"),
        (Mamba2, {"d_model": 4, "headdim": 2, "norm_groups": 3}, "norm_groups must divide"),
        (Hydra, {"d_model": 4, "headdim": 3}, r"headdim must divide expand \* d_model = 8, got 3"),
        (RGLRU, {"d_model": 4, "num_heads": 3}, "num_heads must divide lru_width = 4, got 3"),
        (RGLRU, {"d_model": 4, "num_heads": 2, "a_range": (0.9, 1.0)}, "a_range must be"),
        (Attention, {"d_model": 4, "num_heads": 3}, "num_heads must divide d_model = 4, got 3"),
        (Attention, {"d_model": 4, "num_heads": 4, "num_heads_kv": 3}, "num_heads_kv must divide num_heads = 4, got 3"),
        (Attention, {"d_model": 4, "num_heads": 2, "rotary_emb_dim": 3}, "rotary_emb_dim must be even"),
        (Attention, {"d_model": 4, "num_heads": 2, "window": 0}, "window must be a positive integer, got 0"),
        (MLP, {"d_model": 4, "d_intermediate": 0}, "d_intermediate must be a positive integer, got 0"),
        (MLP, {"d_model": 4, "d_intermediate": 4, "activation": "relu"}, 'activation must be "silu" or "gelu"'),
    ],
)
def test_arguments(make, keywords, part):
    with pytest.raises(ValueError, match=f"{make.__name__}: {part}"):
        make(**keywords)


@pytest.mark.parametrize("make", [Mamba, Mamba2, RGLRU])
def test_width_of_the_convolution(make):
    for d_conv in (1, 9, 2.0):
        with pytest.raises(ValueError, match="d_conv must be 2 to 8"):
            make(64, d_conv=d_conv)


@pytest.mark.parametrize("name", LAYERS)
def test_inputs(name, x):
    layer = build(name)
    own = type(layer).__name__
    with pytest.raises(ValueError, match=rf"{own}: x must have shape \(b, l, m\)"):
        layer(x[0])
    with pytest.raises(ValueError, match=f"{own}: .*with m = 8, got"):
        layer(x[..., :5])
    with pytest.raises(TypeError, match=f"{own}: x must be float32"):
        layer(x.long())
    with pytest.raises(TypeError, match=f"{own}: mask must be a torch.Tensor, got list"):
        layer(x, mask=[True])
    with pytest.raises(ValueError, match=rf"{own}: mask must have shape \(b, l\) = \(2, 7\), got \(2, 6\)"):
        layer(x, mask=torch.ones(B, 6))
    with pytest.raises(TypeError, match=f"{own}: cu_seqlens must be a torch.Tensor, got list"):
        layer(x[:1], cu_seqlens=[0, L])
    bounds = torch.tensor([0, L])
    with pytest.raises(ValueError, match=f"{own}: mask must be None with cu_seqlens"):
        layer(x[:1], cu_seqlens=bounds, mask=torch.ones(1, L))


@pytest.mark.parametrize("name", PACKED)
def test_bounds(name, x):
    layer = build(name)
    with pytest.raises(ValueError, match="batch 1 with cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, L]))
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at the length 7"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 5]))


def test_states(causal, x):
    own = type(causal).__name__
    state = causal.init_state(B, max_length=L)
    kind = type(state).__name__
    for wrong, got in ((state[-1], "Tensor"), (tuple(state), "tuple"), ({"scan": state[-1]}, "dict")):
        with pytest.raises(TypeError, match=f"{own}: state must be a {kind}, got {got}. Make it with init_state."):
            causal(x, wrong)
    with pytest.raises(ValueError, match=rf"{own}: state\.\w+ must have shape \(2, .*Make it with init_state\(2\)"):
        causal(x, causal.init_state(B + 1, max_length=L))
    field = state._fields[-1]
    with pytest.raises(TypeError, match=rf"{own}: state.{field} must be a tensor of torch.*got torch.bfloat16"):
        causal(x, state._replace(**{field: torch.empty_like(state[-1], dtype=torch.bfloat16)}))
    with pytest.raises(TypeError, match=rf"{own}: state.{field} must be a tensor of torch.*got NoneType"):
        causal(x, state._replace(**{field: None}))


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_no_state_where_both_sides_are_read(name, x):
    layer = build(name)
    rule = f"{type(layer).__name__}: state must be None in a layer that is not causal"
    with pytest.raises(NotImplementedError, match=rule):
        layer.init_state(B, max_length=L)
    with pytest.raises(NotImplementedError, match=rule):
        layer(x, state=(x,))


def test_attention_needs_a_length(x):
    layer = build("attention_rich")
    with pytest.raises(ValueError, match="Attention: max_length must be given"):
        layer.init_state(B)
    state = layer.init_state(B, max_length=L)
    layer(x, state)
    saved = layers.copy(state)
    with pytest.raises(ValueError, match="Attention: a sequence must have at most max_length = 7 tokens, got 8"):
        layer(x[:, :1], state)
    assert all(torch.equal(a, b) for a, b in zip(state, saved, strict=True))
    # One row is full, the other is not.
    state.length[0] = 2
    with pytest.raises(ValueError, match="at most max_length = 7 tokens"):
        layer(x[:, :2], state)


def test_attention_over_its_length_on_a_device():
    """Where the length is not read, outputs beyond it are NaN, and no others."""
    layer = build("attention")
    x, state = torch.randn(1, 6, M, dtype=torch.float64), layer.init_state(1, max_length=4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        y = compiled(x, state)
    torch.testing.assert_close(y[:, :4], layer(x[:, :4]))
    assert y[:, 4:].isnan().all()
