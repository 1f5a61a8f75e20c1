"""Packed sequences in attention on a GPU: the flash kernel against sequences one by one."""

from itertools import pairwise

import pytest
import torch

from ssmscan.layers import Attention


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"num_heads_kv": 2}, {"causal": False}, {"head_dim": 12}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed(options, dtype):
    """Outputs and gradients; empty sequences too. float32, and heads of 12 channels, take a mask."""
    torch.manual_seed(0)
    layer = Attention(64, 4, device="cuda", **options)
    x = torch.randn(1, 50, 64, device="cuda", requires_grad=True)
    bounds = [0, 0, 1, 20, 20, 47, 50, 50]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        packed = layer(x, cu_seqlens=torch.tensor(bounds, device="cuda"))
        sizes = [end - start for start, end in pairwise(bounds)]
        apart = torch.cat([layer(part) for part in x.split(sizes, 1) if part.shape[1]], 1)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(packed, apart, rtol=0, atol=bound * apart.abs().max().item())
    dy = torch.randn_like(packed)
    ours, theirs = (torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True) for y in (packed, apart))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=bound * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [[0, 30, 20, 50], [5, 50], [0, 40], [0, 90]])
def test_bad_bounds_are_nan(bounds):
    """On a device their values are not waited for, and no kernel leaves its tensors."""
    layer = Attention(64, 4, device="cuda")
    x = torch.randn(1, 50, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x, cu_seqlens=torch.tensor(bounds, device="cuda"))
    assert y.isnan().any()
    torch.cuda.synchronize()
