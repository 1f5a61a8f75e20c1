"""What goes between the ranks of tensor parallelism, and how often; that it is right is seen in test_parallelize."""

from copy import deepcopy
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ssmscan.bench.sent import Sent
from ssmscan.distributed import parallelize
from ssmscan.distributed.vocabulary import SplitVocabulary
from ssmscan.layers import MLP, Attention, Mamba, Mamba2
from ssmscan.models import SSMConfig, SSMForCausalLM

B, L, M, V = 2, 16, 32, 1000
N = 4
# Of one activation in bfloat16.
STREAM = 2 * B * L * M
LAYERS = {
    "mamba2": partial(Mamba2, M, headdim=16, d_state=N),
    "mamba2_bias": partial(Mamba2, M, headdim=16, d_state=N, bias=True),
    "mamba": partial(Mamba, M, d_state=N),
    "attention": partial(Attention, M, num_heads=4, num_heads_kv=1),
    "mlp": partial(MLP, M, M),
}
# Rows of B and C, that every rank has, by m columns in float32, and what the convolution has for them.
SHARED = 4 * 2 * N * (M + 4 + 1)
# The bytes of each sum, in the forward and in the backward.
SENT = {
    # A number for each token, for the norm.
    "mamba2": ([4 * B * L, STREAM], [STREAM, SHARED]),
    "mamba2_bias": ([4 * B * L, STREAM], [STREAM, SHARED + 4 * 2 * N]),
    # And δ, B and C, which all channels make together.
    "mamba": ([STREAM, 2 * B * L * (M // 16 + 2 * N)],) * 2,
    # Keys and values of one head of 8 channels.
    "attention": ([STREAM], [STREAM, 4 * 2 * 8 * M]),
    "mlp": ([STREAM], [STREAM]),
}


def _sent(forward):
    """The bytes of each collective in a forward under autocast, and in its backward."""
    with torch.autograd.set_multithreading_enabled(False):
        with torch.autocast("cpu", torch.bfloat16), Sent() as before:
            y = forward()
        with Sent() as after:
            y.sum().backward()
    return sorted(before.bytes), sorted(after.bytes)


def _worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    found = {}
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer = parallelize(make(), mesh)
        x = torch.randn(B, L, M, requires_grad=True)
        found[name] = _sent(partial(layer, x))
    options = {"mamba2": {"headdim": 16, "d_state": N}}
    model = SSMForCausalLM(SSMConfig(vocab_size=V, hidden_size=M, mixers=["mamba2"], mixer_options=options))
    parallelize(model, mesh)
    tokens = torch.arange(B * L).view(B, L)
    found["model"] = _sent(lambda: model(tokens, shift_labels=tokens, return_logits=False).loss)
    found["losses"] = _losses(mesh)
    _copies(model, tokens)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _losses(mesh):
    """Of logits that the ranks share: a target in each part, nothing asked for, and what is no token."""
    vocabulary, own = SplitVocabulary(mesh, 3), mesh.get_local_rank()
    logits = torch.arange(24.0).sin().view(4, 6)
    losses, gradient = vocabulary.cross_entropy(logits[:, 3 * own : 3 * own + 3], torch.tensor([1, 5, -100, 6]))
    return losses, gradient


@torch.no_grad()
def _copies(model, tokens):
    """A copy computes with weights of its own."""
    model.zero_grad()
    before = model(tokens).logits
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.zero_()
    assert copy(tokens).logits.count_nonzero() == 0
    assert torch.equal(model(tokens).logits, before)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start(_worker, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_sends_its_output_and_its_gradient(found, name):
    """In the dtype of the products, and little else."""
    forward, backward = SENT[name]
    assert found[0][name] == (sorted(forward), sorted(backward))


def test_the_loss_sends_no_logits(found):
    """Two numbers for each token. The head's input has its gradient along with the loss, and the embedding is wide."""
    layer, gradients = SENT["mamba2"]
    assert found[0]["model"] == (sorted([2 * STREAM, *layer, 4 * 2 * B * L, STREAM]), sorted(gradients))


def test_losses_of_shared_logits(found):
    logits = torch.arange(24.0, dtype=torch.float64).sin().view(4, 6).requires_grad_()
    expected = nn.functional.cross_entropy(logits[:3], torch.tensor([1, 5, -100]), reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    for rank, result in enumerate(found):
        losses, part = result["losses"]
        torch.testing.assert_close(losses[:3].double(), expected.detach(), rtol=1e-6, atol=1e-6)
        assert losses[3].isnan()
        torch.testing.assert_close(part[:3].double(), gradient[:3, 3 * rank : 3 * rank + 3], rtol=1e-6, atol=1e-6)
