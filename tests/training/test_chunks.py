"""Long sequences in chunks: the loss and the gradients of the whole, and what is kept meanwhile."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssmscan.models import SSMConfig, SSMForCausalLM, preset
from ssmscan.tasks import IGNORE
from ssmscan.training import chunked_backward

OPTIONS = {
    "gated_ssm": {"expand": 2},
    "matrix_ssm": {"headdim": 4},
    "s4d": {"d_state": 4},
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 4, "ngroups": 2},
    "rg_lru": {"num_heads": 2},
    "attention": {"num_heads": 2, "num_heads_kv": 1, "d_conv": 3},
    "hydra": {"headdim": 4},
}
STATEFUL = sorted(set(OPTIONS) - {"hydra"})
BOUND = 1e-10


def _model(*mixers, **options):
    torch.manual_seed(0)
    config = SSMConfig(
        vocab_size=11,
        hidden_size=8,
        mixers=list(mixers),
        mixer_options={name: OPTIONS[name] for name in mixers} | options,
    )
    return SSMForCausalLM(config).double().train()


def _tokens(rows=2, length=23):
    tokens = torch.randint(11, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[:, ::5] = IGNORE
    return tokens[:, :-1], targets


def _loss(model, tokens, targets, **options):
    return model(tokens, shift_labels=targets, return_logits=False, **options).loss


def _gradients(model):
    """Of all parameters, which have none afterwards."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def _compare(model, chunk, **packed):
    tokens, targets = _tokens(rows=1 if packed else 2)
    loss = _loss(model, tokens, targets, **packed)
    loss.backward()
    expected = _gradients(model)
    found = chunked_backward(model, tokens, targets, chunk, **packed)
    assert abs(found - loss).item() < BOUND
    for name, gradient in _gradients(model).items():
        assert (gradient - expected[name]).abs().max().item() < BOUND, name
        assert gradient.abs().max().item() > 0, name


@pytest.mark.parametrize("mixer", STATEFUL)
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_and_gradients_are_those_of_the_whole(mixer, chunk):
    _compare(_model(mixer, mixer), chunk)


def test_a_hybrid():
    _compare(_model("mamba2", "attention", "rg_lru"), 6)


def test_attention_with_a_window():
    _compare(_model("attention", "attention", attention={"num_heads": 2, "window": 5}), 4)


@pytest.mark.parametrize("mixer", sorted(set(STATEFUL) - {"attention"}))
@pytest.mark.parametrize("chunk", [1, 6])
def test_packed(mixer, chunk):
    """Sequences that end with a chunk, within one, and go on over several; an empty one, and one of a token."""
    _compare(_model(mixer, mixer), chunk, cu_seqlens=torch.tensor([0, 6, 6, 7, 20, 23]))


def test_nothing_passes_between_packed_sequences():
    """Not even what is not a number."""
    model = _model("mamba2")
    tokens, targets = _tokens(rows=1, length=12)
    targets[:, :6] = IGNORE
    bounds = torch.tensor([0, 6, 12])
    with torch.no_grad():
        model.backbone.embeddings.weight[tokens[0, 0]] = torch.nan
    tokens[:, 1:][tokens[:, 1:] == tokens[0, 0]] = (tokens[0, 0] + 1) % 11
    targets[targets == tokens[0, 0]] = IGNORE
    model.lm_head.weight = torch.nn.Parameter(torch.randn(11, 8, dtype=torch.float64))
    loss = chunked_backward(model, tokens, targets, 6, cu_seqlens=bounds)
    assert loss.isfinite()


def test_truncated():
    """The loss is that of the whole, and the gradients are those of chunks whose entering states are constants."""
    model, (tokens, targets) = _model("mamba2", "attention"), _tokens()
    answers = (targets != IGNORE).sum()
    cache, loss = model.make_cache(2, 23), 0
    for first in range(0, 23, 7):
        own = slice(first, first + 7)
        part = _loss(model, tokens[:, own], targets[:, own], cache=cache, num_items_in_batch=answers)
        part.backward()
        loss += part.detach()
    expected = _gradients(model)
    found = chunked_backward(model, tokens, targets, 7, truncate=True)
    assert abs(found - loss).item() < BOUND
    assert abs(found - _loss(model, tokens, targets)).item() < BOUND
    for name, gradient in _gradients(model).items():
        assert (gradient - expected[name]).abs().max().item() < BOUND, name
    chunked_backward(model, tokens, targets, 7)
    exact = _gradients(model)
    assert any((exact[name] - expected[name]).abs().max() > 1e-6 for name in exact)


def test_scale_and_number_of_items():
    model, (tokens, targets) = _model("gated_ssm"), _tokens()
    loss = chunked_backward(model, tokens, targets, 5)
    expected = _gradients(model)
    again = chunked_backward(model, tokens, targets, 5, num_items_in_batch=7, scale=torch.tensor(16.0))
    ratio = int((targets != IGNORE).sum()) / 7
    assert abs(again - loss * ratio).item() < BOUND
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, expected[name] * ratio * 16, rtol=1e-10, atol=1e-12)


def test_autocast():
    """It is on in each forward, and what it keeps of the first pass takes no gradient away from the second."""
    model, (tokens, targets) = _model("gated_ssm", "attention").float(), _tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model, tokens, targets)
    loss.backward()
    expected = _gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_backward(model, tokens, targets, 6)
    assert abs(found - loss).item() < 1e-2
    assert abs(found - _loss(model, tokens, targets)).item() > 1e-6
    for name, gradient in _gradients(model).items():
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


class _Most(TorchDispatchMode):
    """The largest tensor that an operation returns, in numbers."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        ]
        self.most = max(self.most, *sizes, 0)
        return result


@pytest.mark.parametrize("truncate", [False, True])
def test_no_activation_is_longer_than_a_chunk(truncate):
    model = _model("gated_ssm")
    most = []
    for length in (64, 256):
        with _Most() as seen:
            chunked_backward(model, *_tokens(1, length), 16, truncate=truncate)
        most.append(seen.most)
    assert most[0] == most[1]


def _on_a_gpu(length, chunk=None):
    """Loss and gradients of four layers of the 130M Mamba-2 in bfloat16, and the memory that this takes (bytes)."""
    # Gradients of a run before are there as well.
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = SSMForCausalLM(preset("mamba2-130m", mixers=["mamba2"] * 4, vocab_size=1024)).cuda().train()
    tokens = torch.randint(1024, (1, length + 1), generator=torch.Generator().manual_seed(1)).cuda()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        if chunk is None:
            loss = _loss(model, tokens[:, :-1], tokens[:, 1:])
        else:
            loss = chunked_backward(model, tokens[:, :-1], tokens[:, 1:], chunk)
    if chunk is None:
        loss.backward()
    return loss.detach(), _gradients(model), torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_65536_tokens_on_a_gpu():
    """As the plain run has them, to the noise of bfloat16."""
    loss, expected, whole = _on_a_gpu(2**16)
    found, gradients, peak = _on_a_gpu(2**16, chunk=2**13)
    assert abs(found - loss) < 1e-3 * loss
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm(), name
    assert peak < whole / 4
    # Beside tokens, 16 bytes each, the states between the chunks. One activation of a chunk would be 12 MiB more.
    _, _, longer = _on_a_gpu(2**18, chunk=2**13)
    states = 24 * 4 * 4 * (24 * 64 * 128 + 3 * 1792)
    assert longer - peak < states + 16 * 3 * 2**16 + 2**22


def test_refusals():
    tokens, targets = _tokens()
    with pytest.raises(ValueError, match="chunked_backward: chunk must be at least 1, got 0"):
        chunked_backward(_model("mamba2"), tokens, targets, 0)
    with pytest.raises(ValueError, match=r"shift_labels must have the shape of input_ids, \(2, 23\), got \(2, 22\)"):
        chunked_backward(_model("mamba2"), tokens, targets[:, 1:], 4)
    with pytest.raises(NotImplementedError, match="state must be None in a layer that is not causal"):
        chunked_backward(_model("hydra"), tokens, targets, 4)
    with pytest.raises(NotImplementedError, match="packed sequences must have no attention"):
        chunked_backward(_model("attention"), tokens[:1], targets[:1], 4, cu_seqlens=torch.tensor([0, 23]))
    for bounds, message in (
        ([0, 12, 6, 23], "cu_seqlens must not decrease, got 12 then 6"),
        ([0, 30], "cu_seqlens must start at 0 and end at the length 23, got 0 … 30"),
        ([0], "cu_seqlens must start at 0 and end at the length 23, got 0 … 0"),
    ):
        with pytest.raises(ValueError, match=f"chunked_backward: {message}"):
            chunked_backward(_model("mamba2"), tokens[:1], targets[:1], 6, cu_seqlens=torch.tensor(bounds))
