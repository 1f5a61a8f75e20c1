"""The state contract: a chunk of any length, in place, packed, padded, copied and reordered."""

import copy

import pytest
import torch
from layer_table import B, L, M

from ssmscan import layers
from ssmscan.layers.state import tensors


def same(value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


def same_states(state, expected):
    for a, b in zip(tensors(state), tensors(expected), strict=True):
        same(a, b)


def both_sides(layer):
    return not getattr(layer, "causal", True)


@pytest.fixture
def earlier():
    """What came before x."""
    return torch.randn(B, 4, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("grad", [False, True])
def test_whole_equals_chunks_equals_steps(causal, x, earlier, grad):
    """At every cut, and from a state that is not zero."""
    start = causal.init_state(B, max_length=11)
    causal(earlier, start)
    with torch.set_grad_enabled(grad):
        whole_state = layers.copy(start)
        whole = causal(x, whole_state)
        for sizes in [*([cut, L - cut] for cut in range(L + 1)), [1] * L, [2, 1, 1, 3]]:
            state = layers.copy(start)
            same(torch.cat([causal(chunk, state) for chunk in x.split(sizes, 1)], 1), whole)
            same_states(state, whole_state)
    same(whole, causal(torch.cat([earlier, x], 1))[:, 4:])


def test_a_state_keeps_its_place_and_has_no_gradient(causal, x):
    """Each chunk's graph keeps the state that the chunk read, in whatever order the chunks are differentiated."""
    other = copy.deepcopy(causal)
    state = causal.init_state(B, max_length=L)
    places = [tensor.data_ptr() for tensor in tensors(state)]
    first, second = causal(x[:, :3], state), causal(x[:, 3:], state)
    assert places == [tensor.data_ptr() for tensor in tensors(state)]
    assert not any(tensor.requires_grad for tensor in tensors(state))
    torch.autograd.backward([second.square().sum(), first.square().sum()])

    state = other.init_state(B, max_length=L)
    other(x[:, :3], state).square().sum().backward()
    other(x[:, 3:], state).square().sum().backward()
    for p, q in zip(causal.parameters(), other.parameters(), strict=True):
        same(p.grad, q.grad)


def test_packed_equals_separate(layer, x):
    bounds = torch.tensor([0, 3, 3, 7])
    together = layer(x[:1], cu_seqlens=bounds)
    same(together, torch.cat([layer(x[:1, :3]), layer(x[:1, 3:])], 1))


@pytest.mark.parametrize("grad", [False, True])
def test_packed_states(causal, x, earlier, grad):
    """Every sequence goes on from its own row, an empty one too."""
    state, bounds = causal.init_state(3, max_length=L), torch.tensor([0, 3, 3, 7])
    start = earlier[:1].expand(3, -1, -1) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    causal(start[:, :3], state)
    with torch.set_grad_enabled(grad):
        together = causal(x[:1], state, cu_seqlens=bounds)
    for i in range(3):
        alone = causal.init_state(1, max_length=L)
        causal(start[i : i + 1, :3], alone)
        same(together[:, bounds[i] : bounds[i + 1]], causal(x[:1, bounds[i] : bounds[i + 1]], alone))
        same_states([tensor[i : i + 1] for tensor in tensors(state)], list(alone))


def test_rows_of_a_batch_are_apart(layer, x):
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(layer(x)[0], layer(changed)[0])


@pytest.mark.parametrize("t", [0, 3, L - 1])
def test_who_sees_whom(layer, x, t):
    """A causal layer sees what came before, one that reads both sides sees all; attention what its window reaches."""
    changed = x.clone()
    changed[:, t] += 1
    moved = ((layer(x) - layer(changed)).abs() > 1e-9).any(-1).any(0)
    reach = L
    if getattr(layer, "window", None):
        reach = layer.window + (layer.conv1d.kernel_size[0] - 1 if layer.conv1d else 0)
    distance = torch.arange(L) - t
    assert torch.equal(moved, (distance.abs() < reach) & ((distance >= 0) | both_sides(layer)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_left_padding_changes_nothing(causal, x, earlier, grad, dtype):
    """Neither outputs nor states, nor the tokens after, nor a chunk which is padding for a row altogether."""
    mask = torch.ones(B, L, dtype=dtype)
    mask[0, :3] = 0
    padded = x.masked_fill(mask[..., None] == 0, 1e3)
    with torch.set_grad_enabled(grad):
        state = causal.init_state(B, max_length=11)
        for cut in (slice(0, 2), slice(2, 7)):
            y = causal(padded[:, cut], state, mask=mask[:, cut])
        rest = causal(earlier, state)
        for row, start in ((0, 3), (1, 0)):
            alone = causal.init_state(1, max_length=11)
            same(y[row, max(start - 2, 0) :], causal(x[row : row + 1, start:], alone)[0, -5:])
            same(rest[row], causal(earlier[row : row + 1], alone)[0])


def test_left_padding_without_a_state(layer, x):
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :3] = False
    y = layer(x.masked_fill(~mask[..., None], 1e3), mask=mask)
    same(y[0, 3:], layer(x[:1, 3:])[0])
    same(y[1], layer(x[1:])[0])


def test_padding_has_no_gradient(layer, x):
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :3] = False
    x = x.masked_fill(~mask[..., None], torch.inf).requires_grad_()
    layer(x, mask=mask)[mask].square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_copy_and_restore(causal, x):
    state = causal.init_state(B, max_length=2 * L)
    causal(x, state)
    places = [tensor.data_ptr() for tensor in tensors(state)]
    saved = layers.copy(state)
    assert type(saved) is type(state)
    assert not set(places) & {tensor.data_ptr() for tensor in tensors(saved) if tensor.numel()}
    first = causal(x, state)
    layers.restore(state, saved)
    same(causal(x, state), first)
    assert places == [tensor.data_ptr() for tensor in tensors(state)]


def test_reorder(causal, x):
    state = causal.init_state(B, max_length=2 * L)
    causal(x, state)
    places = [tensor.data_ptr() for tensor in tensors(state)]
    layers.reorder(state, torch.tensor([1, 1]))
    assert places == [tensor.data_ptr() for tensor in tensors(state)]
    again = causal.init_state(B, max_length=2 * L)
    causal(x[[1, 1]], again)
    same(causal(x, state), causal(x, again))


def test_states_of_many_layers():
    states = (layers.GatedSSM(M).init_state(2), [layers.Mamba(M).init_state(2)])
    for tensor in tensors(states):
        tensor.copy_(torch.arange(2.0).view(2, *[1] * (tensor.dim() - 1)).expand_as(tensor))
    saved = layers.copy(states)
    layers.reorder(states, torch.tensor([1, 0], dtype=torch.int32))
    assert all((tensor[0] == 1).all() and (tensor[1] == 0).all() for tensor in tensors(states))
    layers.restore(states, saved)
    assert isinstance(saved[1], list)
    assert all((tensor[0] == 0).all() and (tensor[1] == 1).all() for tensor in tensors(states))


def test_nothing_and_nobody(layer):
    assert layer(torch.zeros(0, 5, M, dtype=torch.float64)).shape == (0, 5, M)
    assert layer(torch.zeros(B, 0, M, dtype=torch.float64)).shape == (B, 0, M)
    if not both_sides(layer):
        state = layer.init_state(B, max_length=2)
        assert layer(torch.zeros(B, 0, M, dtype=torch.float64), state).shape == (B, 0, M)
        same_states(state, layer.init_state(B, max_length=2))
