"""When a norm takes gated_rms_norm's kernel, which needs a GPU, and that it is the same norm."""

import pytest
import torch

from ssmscan.backend import choose
from ssmscan.layers import RMSNorm, norm
from ssmscan.ops import gated_rms_norm
from ssmscan.testing import assert_close


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        # There is a GPU, as far as a norm knows.
        monkeypatch.setattr(
            norm, "choose", lambda function, backend, _, dtype: choose(function, backend, "cuda", dtype)
        )
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call of the operation."""
    seen = []

    def counted(*arguments, **keywords):
        seen.append(keywords)
        return gated_rms_norm(*arguments, **keywords)

    monkeypatch.setattr(norm, "gated_rms_norm", counted)
    return seen


def _layer(dtype, device):
    layer = RMSNorm(6, eps=1e-6, device=device, dtype=dtype)
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype_of_x", [torch.float32, torch.bfloat16], ids=str)
def test_same_norm(dtype, dtype_of_x, device, calls):
    """As with gradients, where it is PyTorch's."""
    layer = _layer(dtype, device)
    x = torch.randn(2, 3, 6, device=device, dtype=dtype_of_x)
    with torch.no_grad():
        ours = layer(x)
    assert calls == [{"eps": 1e-6, "dtype": dtype}]
    pytorchs = layer(x)
    assert len(calls) == 1
    assert ours.dtype is pytorchs.dtype is dtype
    narrow = torch.bfloat16 if torch.bfloat16 in (dtype, dtype_of_x) else torch.float32
    assert_close({"y": ours}, {"y": pytorchs}, narrow)


@torch.no_grad()
def test_under_autocast(device, calls):
    """The output is in the module's dtype still."""
    layer, x = _layer(torch.float32, device), torch.randn(2, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert len(calls) == 1
    assert y.dtype is torch.float32
    assert torch.equal(y, layer(x))


@torch.no_grad()
def test_left_to_pytorch(device, calls):
    """float64, transforms, and an eps that the operation refuses."""
    layer, x = _layer(torch.float32, device), torch.randn(2, 6, device=device)
    assert layer(x.double()).dtype is torch.float32
    assert layer.double()(x).dtype is torch.float64
    layer.float()
    assert_close({"y": torch.func.vmap(layer)(x)}, {"y": layer(x[None])[0]}, torch.float32)
    assert len(calls) == 1
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer.eps = 0.0
    layer(x)
    assert len(calls) == 1
