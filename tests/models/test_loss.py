"""The cross entropy in chunks: the value and gradients of the whole, with memory for a chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmscan.models import SSMConfig, SSMForCausalLM, loss
from ssmscan.models.loss import linear_cross_entropy

V = 13


def _whole(head, x, targets):
    return F.cross_entropy(head(x).double(), targets, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients(monkeypatch, rows, dtype):
    """At any size of the chunks; in bfloat16 the sums over chunks are as exact as those of one product."""
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "_CHUNK", rows * V)
    head, x = nn.Linear(6, V).to(dtype), torch.randn(10, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (10,))
    targets[[3, 9]] = -100
    variables = [x, *head.parameters()]
    found = linear_cross_entropy(head, x, targets, V)
    gradients = torch.autograd.grad(3 * found, variables)
    expected = _whole(head, x, targets)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=0)
    for gradient, exact in zip(gradients, torch.autograd.grad(3 * expected, variables), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, exact, rtol=0, atol=bound * exact.abs().max().item())


def test_unlikely_targets_stay_finite():
    """Where a probability underflows its logarithm must not."""
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [500.0]])
    x = torch.ones(1, 1, requires_grad=True)
    found = linear_cross_entropy(head, x, torch.tensor([0]), 2)
    assert found.item() == 500
    assert torch.autograd.grad(found, x)[0].item() == 500


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 13, 5000])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel(device, dtype, v):
    """Against float64, in the interpreter and on a GPU; logits of any size, one row with nothing to foretell."""
    loss_kernel = pytest.importorskip("ssmscan.models.loss_kernel", reason="needs Triton, which Linux has")
    torch.manual_seed(0)
    logits = (30 * torch.randn(6, v)).to(dtype)
    logits[1, : v // 2] = float("-inf")
    targets = torch.randint(v // 2, v, (6,))
    targets[2] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses, dlogits = loss_kernel.cross_entropy(logits.to(device), targets.to(device), -100)
    bound = torch.finfo(dtype).eps
    assert dlogits.dtype == dtype
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-5)
    # The logarithm of a sum near exp(100) is known to half of 7.6e-6.
    torch.testing.assert_close(dlogits.cpu().double(), gradient, rtol=2 * bound, atol=8e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernels_of_parts_of_a_row(device, dtype):
    """Two parts of other lengths make what one call makes; in one row a part has no score but -inf."""
    loss_kernel = pytest.importorskip("ssmscan.models.loss_kernel", reason="needs Triton, which Linux has")
    torch.manual_seed(0)
    v, cut = 5000, 700
    logits = (3 * torch.randn(6, v)).to(device, dtype)
    logits[1, :cut] = float("-inf")
    targets = torch.tensor([0, cut + 1, -100, cut, v - 1, cut - 1], device=device)
    losses, dlogits = loss_kernel.cross_entropy(logits, targets, -100)
    parts = [(logits[:, :cut], 0), (logits[:, cut:], cut)]
    found = torch.stack([loss_kernel.levels(part, targets, first) for part, first in parts])
    level = found[:, 0].logsumexp(0)
    asked = targets != -100
    torch.testing.assert_close((level - found[:, 1].sum(0))[asked], losses[asked], rtol=1e-6, atol=1e-5)
    gradients = [loss_kernel.gradient(part, targets, level, first, -100) for part, first in parts]
    torch.testing.assert_close(torch.cat(gradients, 1), dlogits, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel_tells_what_is_not_a_number(device):
    """A logit, and a target that is no token: NaN, which ends a run."""
    loss_kernel = pytest.importorskip("ssmscan.models.loss_kernel", reason="needs Triton, which Linux has")
    logits = torch.zeros(5, V, device=device)
    logits[0, 3], logits[1, 4] = float("nan"), float("inf")
    losses, _ = loss_kernel.cross_entropy(logits, torch.tensor([0, 0, V, -1, 2], device=device), -100)
    assert losses.isnan().tolist() == [True, True, True, True, False]


def test_nothing_to_foretell():
    head, x = nn.Linear(6, V), torch.randn(4, 6, requires_grad=True)
    found = linear_cross_entropy(head, x, torch.full((4,), -100), V)
    assert found.item() == 0
    assert torch.autograd.grad(found, x)[0].abs().max() == 0
    assert linear_cross_entropy(head, x[:0], torch.zeros(0, dtype=torch.int64), V).item() == 0


def test_a_head_that_is_not_trained():
    """As an adapter's base is not: no gradient is computed for it."""
    head, x = nn.Linear(6, V).requires_grad_(False), torch.randn(4, 6, requires_grad=True)
    targets = torch.arange(4)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(head, x, targets, V), x)
    (expected,) = torch.autograd.grad(_whole(head, x, targets), x)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        found = linear_cross_entropy(head.requires_grad_(), x, targets, V)
    assert not found.requires_grad


def test_sums_beyond_float16():
    """The mean is a float16 where the sum is none."""
    head, x = nn.Linear(1, 2, bias=False).half(), torch.ones(200_000, 1, dtype=torch.float16, requires_grad=True)
    head.weight.data.zero_()
    targets = torch.zeros(200_000, dtype=torch.int64)
    (linear_cross_entropy(head, x, targets, 2) / 200_000).backward()
    torch.testing.assert_close(head.weight.grad, torch.tensor([[-0.5], [0.5]], dtype=torch.float16))


def test_a_head_with_parameters_of_no_use():
    class Head(nn.Linear):
        def __init__(self):
            super().__init__(4, V)
            self.idle = nn.Parameter(torch.zeros(3))

    head, x = Head(), torch.randn(5, 4, requires_grad=True)
    linear_cross_entropy(head, x, torch.arange(5), V).backward()
    assert head.idle.grad.tolist() == [0, 0, 0]


def test_no_copy_of_all_logits(monkeypatch):
    """What the forward holds at once is a chunk's."""
    monkeypatch.setattr(loss, "_CHUNK", 8 * 1000)
    made = []

    class Head(nn.Linear):
        def forward(self, x):
            made.append(x.shape[0])
            return super().forward(x)

    head, x = Head(4, 1000), torch.randn(50, 4, requires_grad=True)
    linear_cross_entropy(head, x, torch.zeros(50, dtype=torch.int64), 1000).backward()
    assert made == [8] * 6 + [2]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SSMForCausalLM(SSMConfig(vocab_size=V, hidden_size=8, mixers=["gated_ssm"]))


def test_a_models_loss(model, monkeypatch):
    """The same from labels as from shifted ones, with logits as without, and divided by what one says."""
    monkeypatch.setattr(loss, "_CHUNK", 3 * V)
    tokens = torch.randint(V, (2, 7))
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    for labels in ({"labels": tokens}, {"shift_labels": shifted}):
        for logits in (True, False):
            output = model(tokens, **labels, return_logits=logits)
            assert (output.logits is not None) == logits
            torch.testing.assert_close(output.loss, expected)
            halves = model(tokens, **labels, return_logits=logits, num_items_in_batch=torch.tensor(24.0))
            torch.testing.assert_close(halves.loss, expected / 2)


def test_what_a_loss_needs(model):
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="SSMForCausalLM: labels must be given without return_logits, got none"):
        model(tokens, return_logits=False)
    with pytest.raises(ValueError, match="SSMForCausalLM: labels or shift_labels must be given, got both"):
        model(tokens, labels=tokens, shift_labels=tokens)


def test_packed_labels(model):
    """The first token of a sequence is not foretold by the one before it."""
    tokens, cu_seqlens = torch.randint(V, (1, 7)), torch.tensor([0, 3, 7])
    apart = [model(part, labels=part).loss * (part.shape[1] - 1) for part in tokens.split([3, 4], 1)]
    packed = model(tokens, labels=tokens, cu_seqlens=cu_seqlens, return_logits=False).loss
    torch.testing.assert_close(packed, sum(apart) / 5)


@pytest.mark.parametrize("target", [-1, -99, V])
def test_targets_that_are_no_token(target):
    """Are refused, as PyTorch's cross entropy does, and not taken for another token."""
    head, x = nn.Linear(6, V), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(head, x, torch.tensor([0, target, 1]), V)


def test_float16_sums_stay_finite():
    """The gradients of many tokens, whose sum float16 does not hold, and no scale of the loss would mend."""
    head, x = nn.Linear(2, 4, bias=False), torch.ones(2**18, 2)
    with torch.autocast("cpu", torch.float16):
        found = linear_cross_entropy(head, x, torch.zeros(len(x), dtype=torch.int64), 4)
    (gradient,) = torch.autograd.grad(found / len(x), head.weight)
    (exact,) = torch.autograd.grad(_whole(head, x[:1], torch.tensor([0])), head.weight)
    torch.testing.assert_close(gradient, exact, rtol=5e-3, atol=0)
