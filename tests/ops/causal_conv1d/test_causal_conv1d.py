"""What is particular to causal_conv1d: the names of its activation, and states that hold more than it reads."""

import pytest
import torch

from ssmscan import causal_conv1d, causal_conv1d_step


def test_swish_is_silu():
    x, weight, h = torch.randn(2, 9, 3), torch.randn(3, 4), torch.randn(2, 3, 3)
    y, _ = causal_conv1d(x, weight, activation="silu", h0=h)
    assert not torch.equal(causal_conv1d(x, weight, h0=h)[0], y)
    assert torch.equal(causal_conv1d(x, weight, activation="swish", h0=h)[0], y)
    y = causal_conv1d_step(x, weight, activation="silu", h=h.clone())
    assert torch.equal(causal_conv1d_step(x, weight, activation="swish", h=h), y)


@torch.no_grad()
@pytest.mark.parametrize("l", [None, 1, 3])
def test_older_inputs(l, place, launches):
    """They change no output, and move up with the others, in a pool and in the layout of another library too."""
    rows, old, width, tokens = 2, 2, 4, l or 1
    x, weight, bias = torch.randn(rows, tokens, 5), torch.randn(5, width), torch.randn(5)
    past = torch.randn(rows, old + width - 1, 5)
    after = torch.cat([past, x], 1)[:, tokens:]
    given, weight, bias = (t.to(place) for t in (x if l else x[:, 0], weight, bias))
    step = {"x": given, "weight": weight, "bias": bias, "activation": "silu"}
    expected = causal_conv1d_step(**step, h=past[:, old:].to(place, copy=True))
    channels_first = past.transpose(1, 2).contiguous().to(place)
    pool = past.flip(0).to(place)
    launched = len(launches)
    assert torch.equal(causal_conv1d_step(**step, h=channels_first.transpose(1, 2)), expected)
    assert torch.equal(causal_conv1d_step(**step, h=pool, state_indices=torch.tensor([1, 0], device=place)), expected)
    assert len(launches) == 3 * launched
    assert torch.equal(channels_first.transpose(1, 2).cpu(), after)
    assert torch.equal(pool.flip(0).cpu(), after)


@pytest.mark.parametrize("rows", [2, 9])
def test_refused_rows(rows):
    x, weight = torch.randn(2, 5), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"h must have shape \(b, w-1, d\) = \(2, 3, 5\)"):
        causal_conv1d_step(x, weight, h=torch.zeros(2, rows, 5))
