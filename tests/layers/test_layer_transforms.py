"""What PyTorch does with a module: derivatives, copies, compilers, tracers, autocast, recomputation, adapters."""

import copy
import pickle

import pytest
import torch
from layer_table import CAUSAL, KINDS, LAYERS, B, L, M, build
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssmscan import layers
from ssmscan.layers.state import tensors

ALL = pytest.mark.parametrize("name", LAYERS)


def quick(names, *first):
    """The names, of which all but the ``first`` take too long for every run."""
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in names]


BOUNDS = {"rtol": 1e-4, "atol": 1e-5}


@ALL
def test_gradcheck(name):
    layer = build(name)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 3, M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_every_parameter_gets_a_gradient(layer, x):
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(layer, x, how):
    assert torch.equal(how(layer)(x), layer(x))


def compiled_anew(layer, backend):
    """With a limit of compilations of its own: those of a class' forward count together."""
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize("name", quick(LAYERS, "gated_ssm", "s4d", "mamba2", "attention"))
def test_compile(name):
    layer = build(name, torch.float32)
    compiled = compiled_anew(layer, "eager")
    for l in (5, 40):
        x = torch.randn(B, l, M)
        torch.testing.assert_close(compiled(x), layer(x), **BOUNDS)


@pytest.mark.parametrize("name", quick(CAUSAL, "mamba", "attention"))
def test_compile_with_a_state(name):
    layer = build(name, torch.float32)
    compiled = compiled_anew(layer, "eager")
    x, state = torch.randn(B, 12, M), layer.init_state(B, max_length=12)
    with torch.no_grad():
        y = torch.cat([compiled(chunk, state) for chunk in x.split([4, 6, 1, 1], 1)], 1)
    torch.testing.assert_close(y, layer(x), **BOUNDS)


@pytest.mark.slow
@ALL
def test_compile_for_training(name):
    layer = build(name, torch.float32)
    compiled = compiled_anew(layer, "aot_eager")
    for l in (5, 40):
        x = torch.randn(B, l, M)
        expected, got = (torch.autograd.grad(run(x).square().sum(), [*layer.parameters()]) for run in (layer, compiled))
        for value, grad in zip(got, expected, strict=True):
            torch.testing.assert_close(value, grad, rtol=1e-3, atol=1e-4)


def export(layer, strict):
    length = torch.export.Dim("l", min=2, max=4096)
    # Of the first example's length nothing must stay: neither that it is above a chunk, nor that it is not.
    return torch.export.export(layer, (torch.randn(B, 20, M),), dynamic_shapes=({1: length},), strict=strict).module()


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, False) for name in KINDS), *(pytest.param(n, True, marks=pytest.mark.slow) for n in LAYERS)],
)
def test_export_of_any_length(name, strict):
    """Of a layer that can be trained, too."""
    layer = build(name, torch.float32)
    program = export(layer, strict)
    for l in (2, 16, 17, 130):
        x = torch.randn(B, l, M)
        with torch.no_grad():
            torch.testing.assert_close(program(x), layer(x), **BOUNDS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@ALL
def test_trace(name):
    """What TensorBoard draws a graph of."""
    layer = build(name, torch.float32).requires_grad_(False)
    traced = torch.jit.trace(layer, torch.randn(B, 5, M))
    x = torch.randn(B, 9, M)
    torch.testing.assert_close(traced(x), layer(x), **BOUNDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "converted"])
@ALL
def test_low_precision(name, dtype, how):
    layer = build(name, torch.float32)
    x = torch.randn(B, L, M, generator=torch.Generator().manual_seed(1))
    exact = layer(x)
    low, given = (copy.deepcopy(layer).to(dtype), x.to(dtype)) if how == "converted" else (layer, x)
    bound = 1.2e-2 if dtype is torch.bfloat16 else 2e-3

    def close(y):
        return (y.float() - exact).norm() < bound * exact.norm()

    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        y = low(given)
        assert y.dtype is dtype
        assert close(y)
        if name in CAUSAL:
            state = low.init_state(B, max_length=L)
            assert all(t.dtype is not dtype for field, t in state._asdict().items() if field in ("conv", "scan"))
            with torch.no_grad():
                assert close(torch.cat([low(chunk, state) for chunk in given.split([3, 1, 1, 2], 1)], 1))
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype is p.dtype for p in low.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(layer, x, reentrant):
    x.requires_grad_()
    layer(x).square().sum().backward()
    expected = [t.grad.clone() for t in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip((x, *layer.parameters()), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_refuses_a_state(causal, x, reentrant):
    """It would advance twice, the second time from the wrong place; so far it has advanced once."""
    x.requires_grad_()
    state, other = (causal.init_state(B, max_length=L) for _ in range(2))
    y = checkpoint(causal, x, state, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="state must be None where activations are recomputed in the backward"):
        y.sum().backward()
    causal(x, other)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(other), strict=True))


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, as an adapter wraps one, which knows only how to call it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 1, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(1, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def projections(layer):
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@ALL
def test_adapters(name, dtype):
    """Nothing bypasses a projection: an adapter around it that does nothing yet changes nothing, and then it does."""
    layer = build(name).to(dtype)
    x = torch.randn(B, L, M, dtype=dtype)
    found = projections(layer)
    assert {"out_proj"} <= set(found)
    for path in found:
        wrapped = copy.deepcopy(layer)
        adapter = Adapter(getattr(layer, path))
        setattr(wrapped, path, adapter)
        torch.testing.assert_close(wrapped(x), layer(x), rtol=0, atol=1e-9 if dtype is torch.float64 else 2e-2)
        nn.init.constant_(adapter.up.weight, 5.0)
        assert dtype is torch.bfloat16 or (wrapped(x) - layer(x)).abs().max() > 1e-6, path


def test_hooks_see_every_token(layer, x):
    for path in projections(layer):
        seen = []
        handle = getattr(layer, path).register_forward_hook(lambda module, given, y, seen=seen: seen.append(y.shape))
        layer(x)
        handle.remove()
        assert [shape[:2] for shape in seen] == [(B, L)], path


def test_block():
    x = torch.randn(B, L, M)
    block = layers.Block(build("mamba2", torch.float32), layers.RMSNorm(M), layers.MLP(M, 12), layers.RMSNorm(M))
    middle = x + block.mixer(block.norm(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    state = block.init_state(B)
    chunks = torch.cat([block(x[:, :3], state), block(x[:, 3:], state)], 1)
    torch.testing.assert_close(chunks, block(x), **BOUNDS)


def test_block_keeps_the_residual_wide():
    x = torch.randn(B, L, M, dtype=torch.bfloat16)
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        block = layers.Block(build("mamba", torch.float32), layers.RMSNorm(M), residual_in_fp32=wide).bfloat16()
        assert block(x).dtype is dtype
    assert layers.Block(build("mamba"), layers.RMSNorm(M).double(), residual_in_fp32=True)(x.double()).dtype is (
        torch.float64
    )


def test_block_refuses_half_an_mlp():
    with pytest.raises(ValueError, match="Block: mlp and norm2 must be given together, got mlp alone"):
        layers.Block(build("mamba"), layers.RMSNorm(M), layers.MLP(M, 4))
