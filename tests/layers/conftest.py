"""What each test of a layer is given."""

import pytest
import torch
from layer_table import CAUSAL, LAYERS, B, L, M, build


@pytest.fixture
def x():
    return torch.randn(B, L, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(params=LAYERS)
def layer(request):
    return build(request.param)


@pytest.fixture(params=CAUSAL)
def causal(request):
    return build(request.param)
