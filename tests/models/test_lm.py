"""LanguageModel: shapes, the state contract, packing, refusals, weights on disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmscan.models import LanguageModel, LanguageModelConfig

SMALL = LanguageModelConfig(hidden_size=8, layers=3, state_size_mult=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(11, SMALL)


@pytest.fixture
def tokens():
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_chunks_equal_the_whole(model, tokens, size):
    state = model.init_state(2)
    with torch.no_grad():
        chunks = torch.cat([model(chunk, state) for chunk in tokens.split(size, 1)], 1)
    assert chunks.shape == (2, 6, 11)
    torch.testing.assert_close(chunks, model(tokens))


def test_packed_equals_separate(model, tokens):
    packed = model(tokens.view(1, 12), cu_seqlens=torch.tensor([0, 6, 12]))
    torch.testing.assert_close(packed.view(2, 6, 11), model(tokens))


def test_every_parameter_gets_a_gradient(model, tokens):
    model(tokens).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_on_disk(model, tokens, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = LanguageModel(11, SMALL)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(tokens), model(tokens))


def test_refusals(model, tokens):
    with pytest.raises(TypeError, match=r"tokens must be an int32 or int64 tensor, got torch\.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"LanguageModel: tokens must have shape \(b, l\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="one entry for each of 3 blocks, got 2"):
        model(tokens, model.init_state(2)[:2])


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"shortest_memory": 5.0, "longest_memory": 1.0}, "at most longest_memory, got 5.0 and 1.0"),
    ],
)
def test_config_refusals(keywords, part):
    with pytest.raises(ValueError, match=f"model: .*{part}"):
        LanguageModelConfig(**keywords)
