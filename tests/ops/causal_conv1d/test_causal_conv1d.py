"""What is particular to causal_conv1d: the names of its activation."""

import torch

from ssmscan import causal_conv1d, causal_conv1d_step


def test_swish_is_silu():
    x, weight, h = torch.randn(2, 9, 3), torch.randn(3, 4), torch.randn(2, 3, 3)
    y, _ = causal_conv1d(x, weight, activation="silu", h0=h)
    assert not torch.equal(causal_conv1d(x, weight, h0=h)[0], y)
    assert torch.equal(causal_conv1d(x, weight, activation="swish", h0=h)[0], y)
    y = causal_conv1d_step(x, weight, activation="silu", h=h.clone())
    assert torch.equal(causal_conv1d_step(x, weight, activation="swish", h=h), y)
