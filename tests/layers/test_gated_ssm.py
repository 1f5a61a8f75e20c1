"""GatedSSM: the equations, the state contract, dtypes, the start, refusals."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ssmscan.layers import GatedSSM, RMSNorm

B, L, M = 2, 7, 6


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return GatedSSM(M, state_size_mult=2)


@pytest.fixture
def x():
    return torch.randn(B, L, M, generator=torch.Generator().manual_seed(1))


def test_equations(layer, x):
    """The docstring's equations, as a loop over time."""
    u = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    v, i, o, r = (u @ layer.in_proj.weight.T).chunk(4, -1)
    a, b, c = torch.sigmoid(r + layer.decay_bias), torch.sigmoid(i + layer.input_bias), F.silu(o)
    h, ys = torch.zeros(B, 2 * M), []
    for t in range(L):
        h = a[:, t] * h + b[:, t] * v[:, t]
        ys.append(c[:, t] * h)
    torch.testing.assert_close(layer(x), x + torch.stack(ys, 1) @ layer.out_proj.weight.T)


def test_without_norm_and_residual(x):
    layer = GatedSSM(M, use_norm=False, use_residual=False)
    scaled = GatedSSM(M, use_norm=True, use_residual=True)
    scaled.load_state_dict(layer.state_dict() | {"norm.weight": torch.ones(M)})
    u = scaled.norm(x)
    torch.testing.assert_close(x + layer(u), scaled(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("split", range(L + 1))
def test_chunks_equal_the_whole(layer, x, split, grad):
    with torch.set_grad_enabled(grad):
        whole_state, state = layer.init_state(B), layer.init_state(B)
        whole = layer(x, whole_state)
        chunks = torch.cat([layer(x[:, :split], state), layer(x[:, split:], state)], 1)
    torch.testing.assert_close(whole, layer(x))
    torch.testing.assert_close(chunks, whole)
    torch.testing.assert_close(state.h, whole_state.h)


@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_whole(layer, x, grad):
    with torch.set_grad_enabled(grad):
        state = layer.init_state(B)
        steps = [layer(x[:, t : t + 1], state) for t in range(L)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x))


def test_state_is_updated_in_place_and_carries_no_gradient(layer, x):
    state = layer.init_state(B)
    memory = state.h.data_ptr()
    layer(x[:, :3], state)
    loss = layer(x[:, 3:], state).square().sum()
    assert state.h.data_ptr() == memory
    assert not state.h.requires_grad
    loss.backward()  # the second chunk's own graph, with the state that it read


def test_packed_equals_separate(layer, x):
    lengths = [3, 0, 4]
    packed, bounds = x[:1], torch.tensor([0, 3, 3, 7])
    start = torch.randn(3, layer.state_size)
    state = layer.init_state(3)
    state.h.copy_(start)
    together = layer(packed, state, cu_seqlens=bounds)
    for i, piece in enumerate(packed.split(lengths, 1)):
        alone = layer.init_state(1)
        alone.h.copy_(start[i : i + 1])
        torch.testing.assert_close(together[:, bounds[i] : bounds[i + 1]], layer(piece, alone))
        torch.testing.assert_close(state.h[i : i + 1], alone.h)


def test_no_leak_between_packed_sequences(layer, x):
    bounds = torch.tensor([0, 3, 7])
    changed = x[:1].clone()
    changed[:, 2] += 1
    before, after = layer(x[:1], cu_seqlens=bounds), layer(changed, cu_seqlens=bounds)
    assert torch.equal(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("how", ["compute_dtype", "autocast", "converted"])
def test_low_precision(x, dtype, bound, how):
    torch.manual_seed(0)
    layer = GatedSSM(M)
    exact = layer(x)
    if how == "compute_dtype":
        low = GatedSSM(M, compute_dtype=dtype)
        low.load_state_dict(layer.state_dict())
    else:
        low = copy.deepcopy(layer).to(dtype) if how == "converted" else layer
    given = x.to(dtype) if how == "converted" else x
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        state = low.init_state(B)
        y = low(given, state)
    assert y.dtype is given.dtype
    assert state.h.dtype is torch.float32
    assert ((y - exact).square().mean() / exact.square().mean()).sqrt() < bound
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype is p.dtype for p in low.parameters())


def test_decay_is_never_rounded_to_one():
    """A channel which remembers for a million tokens still forgets in bfloat16."""
    layer = GatedSSM(M, compute_dtype=torch.bfloat16, memory=(1e6, 1e6)).bfloat16()
    layer.in_proj.weight.data.zero_()
    state = layer.init_state(1)
    state.h.fill_(1.0)
    layer(torch.zeros(1, 1000, M, dtype=torch.bfloat16), state)
    torch.testing.assert_close(state.h, torch.full_like(state.h, math.exp(-1e-3)), rtol=1e-4, atol=0)


def test_conversion_keeps_the_gate_biases_wide(layer):
    before = layer.decay_bias.detach().clone()
    layer.decay_bias.grad = torch.ones_like(before)
    layer.bfloat16()
    assert torch.equal(layer.decay_bias, before)
    assert layer.in_proj.weight.dtype is torch.bfloat16
    assert layer.double().decay_bias.dtype is torch.float64
    assert layer.to("meta").decay_bias.device.type == "meta"


def test_gradcheck(x):
    torch.manual_seed(0)
    layer = GatedSSM(3, state_size_mult=1, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    given = (x[:1, :4, :3].double().requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(run, given)


def test_memories_are_spread_evenly_in_the_logarithm():
    layer = GatedSSM(64, state_size_mult=4)
    log_a = F.logsigmoid(layer.decay_bias.double())
    tau = (-1 / log_a).log10()
    assert tau.min().item() == pytest.approx(0, abs=1e-4)
    assert tau.max().item() == pytest.approx(3, abs=1e-3)
    counts = torch.histc(tau, bins=3, min=-1e-3, max=3 + 2e-3)
    assert (counts / len(tau) - 1 / 3).abs().max() < 0.01
    a, b = log_a.exp(), torch.sigmoid(layer.input_bias.double())
    torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a), rtol=0, atol=1e-5)


def test_every_channel_starts_with_the_same_variance():
    """Whatever its memory: the input gate makes up for it."""
    torch.manual_seed(0)
    layer = GatedSSM(16, state_size_mult=8, memory=(1.0, 100.0))
    state = layer.init_state(256)
    with torch.no_grad():
        # Without input-dependent gates, as at the centre of the distribution of inputs.
        layer.in_proj.weight[layer.state_size :].zero_()
        layer(torch.randn(256, 400, 16), state)
    std = state.h.std(0) / layer.in_proj.weight[: layer.state_size].norm(dim=1)
    assert std.min() > 0.7
    assert std.max() < 1.4


def test_biases_are_marked(layer):
    marked = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"decay_bias", "input_bias"}


def test_empty_batch_and_length(layer):
    assert layer(torch.zeros(0, 5, M)).shape == (0, 5, M)
    state = layer.init_state(B)
    state.h.fill_(2.0)
    assert layer(torch.zeros(B, 0, M), state).shape == (B, 0, M)
    assert (state.h == 2).all()


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": 4, "state_size_mult": 1.5}, "state_size_mult must be a positive integer, got 1.5"),
        ({"hidden_size": 4, "memory": (0.0, 1.0)}, "memory must be"),
        ({"hidden_size": 4, "memory": (9.0, 1.0)}, "memory must be"),
    ],
)
def test_refuses_arguments(keywords, part):
    with pytest.raises(ValueError, match=f"GatedSSM: {part}"):
        GatedSSM(**keywords)


def test_refuses_inputs(layer, x):
    with pytest.raises(ValueError, match=r"GatedSSM: x must have shape \(b, l, m\)"):
        layer(x[0])
    with pytest.raises(ValueError, match="with m = 6, got"):
        layer(x[..., :5])
    with pytest.raises(TypeError, match=r"GatedSSM: x must be float32"):
        layer(x.long())
    with pytest.raises(ValueError, match=r"state.h must have shape \(b, d\) = \(2, 12\)"):
        layer(x, layer.init_state(B + 1))
    with pytest.raises(TypeError, match=r"state.h must be torch.float32"):
        layer(x, layer.init_state(B)._replace(h=torch.zeros(B, 12, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="batch 1 with cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, L]))


def test_rms_norm():
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    norm = RMSNorm(4).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype is torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=4e-3, atol=0)
