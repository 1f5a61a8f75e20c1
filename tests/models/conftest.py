"""Small models for the tests."""

import pytest
import torch

from ssmscan.models import SSMConfig, SSMForCausalLM

VOCABULARY = 19
OPTIONS = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 4},
    "hydra": {"d_state": 4, "headdim": 4},
    "matrix_ssm": {"d_state": 4, "headdim": 4},
    "s4d": {"d_state": 4},
    "rg_lru": {"num_heads": 2},
    "attention": {"num_heads": 2},
}
SHAPES = {
    "mamba": ["mamba", "mamba"],
    "mamba2": ["mamba2", "mamba2"],
    "hybrid": ["mamba2", "attention", "mamba"],
}


def _config(shape="hybrid", **fields):
    """A config of a few thousand parameters; ``shape`` is one of SHAPES, or the mixers."""
    mixers = SHAPES[shape] if isinstance(shape, str) else list(shape)
    options = {name: OPTIONS[name] for name in OPTIONS if name in mixers}
    return SSMConfig(
        **({"vocab_size": VOCABULARY, "hidden_size": 8, "mixers": mixers, "mixer_options": options} | fields)
    )


@torch.no_grad()
def _disturb(model):
    """Weights at which every part of a model matters, so that none could be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("A_log", "dt_bias") or "dt_proj" in name:
            continue
        noise = torch.empty(p.shape).uniform_(-1, 1, generator=generator)
        p.copy_(1 + 0.5 * noise if "norm" in name or last == "D" else 0.5 * noise)
    return model


def _model(shape="hybrid", **fields):
    """A model in eval mode whose weights are far from their start."""
    torch.manual_seed(0)
    return _disturb(SSMForCausalLM(_config(shape, **fields))).eval()


@pytest.fixture
def small_config():
    return _config


@pytest.fixture
def small_model():
    return _model


@pytest.fixture
def disturb():
    return _disturb


@pytest.fixture(params=list(SHAPES))
def model(request):
    return _model(request.param)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
