"""Attention over a split sequence, whose ranks run in turn in this process: results, and what has a mask."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ssmscan.layers import Attention
from ssmscan.layers.context import Context, Extent

OPTIONS = {
    "plain": {},
    "shared": {"num_heads_kv": 2},
    "window": {"window": 7},
    "both": {"causal": False},
    "window_both": {"window": 7, "causal": False},
}
LENGTHS = (0, 17, 1, 32)
BOUNDS = [0, 0, 1, 20, 20, 47, 50, 50]
HALF = (torch.bfloat16, torch.float16)


class Recording(Context):
    """A whole sequence, whose keys and values are kept."""

    def gather(self, extent, *parts):
        self.parts = parts
        return parts


class Rank(Context):
    """One of several processes, that all have sent theirs."""

    split = True

    def __init__(self, rank, lengths, parts):
        self.known, self.parts = Extent(lengths, rank), parts

    def extent(self, length, device):
        assert length == self.known.lengths[self.known.rank]
        return self.known

    def gather(self, extent, *parts):
        return self.parts


def _by_ranks(layer, x, lengths, cu_seqlens, parts):
    outputs = []
    for rank, stretch in enumerate(x.split(lengths, 1)):
        layer.context = Rank(rank, lengths, parts)
        outputs.append(layer(stretch, cu_seqlens=cu_seqlens))
    return torch.cat(outputs, 1)


def _on(device, *dtypes):
    marks = (pytest.mark.gpu,) if device == "cuda" else ()
    return [pytest.param(device, dtype, marks=marks, id=f"{device}-{dtype}") for dtype in dtypes]


def _one_by_one(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What `varlen_attn` is said to compute: places are counted from each sequence's last query and last key."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        distance = torch.arange(q0 - q1, 0).unsqueeze(1) - torch.arange(k0 - k1, 0)
        before, after = (bound if bound >= 0 else len(key) for bound in window_size)
        visible = (distance <= before) & (distance >= -after)
        q, k, v = (part.transpose(0, 1) for part in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outputs.append(F.scaled_dot_product_attention(q, k, v, visible).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "window_both"])
def test_sequences(name, packed, monkeypatch):
    """The kernel of packed sequences is told where each begins and ends: by one that runs anywhere."""
    torch.manual_seed(0)
    layer, cu_seqlens = Attention(64, 4, **OPTIONS[name], dtype=torch.float64), torch.tensor(BOUNDS)
    x = torch.randn(1 if packed else 2, sum(LENGTHS), 64, dtype=torch.float64)
    layer.context = context = Recording()
    expected = layer(x, cu_seqlens=cu_seqlens if packed else None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _one_by_one)
    monkeypatch.setattr(layer, "_flash", lambda q: q.shape[1] > 0)
    found = _by_ranks(layer, x, LENGTHS, cu_seqlens if packed else None, context.parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("device", "dtype"), _on("cpu", torch.float64) + _on("cuda", torch.float32, *HALF))
def test_ranks(device, dtype, name, packed, monkeypatch):
    """Outputs and gradients are those of a whole sequence, whose kernel has a mask."""
    torch.manual_seed(0)
    layer = Attention(64, 4, **OPTIONS[name], device=device, dtype=torch.float32 if dtype in HALF else dtype)
    x = torch.randn(1 if packed else 2, sum(LENGTHS), 64, device=device, dtype=layer.in_proj.weight.dtype)
    x.requires_grad_()
    cu_seqlens = torch.tensor(BOUNDS, device=device) if packed else None
    layer.context = context = Recording()
    flash, visible, masks = layer._flash, layer._visible, []

    def recorded(*arguments):
        masks.append(visible(*arguments))
        return masks[-1]

    with torch.autocast(device, dtype, enabled=dtype in HALF):
        monkeypatch.setattr(layer, "_flash", lambda q: False)
        expected = layer(x, cu_seqlens=cu_seqlens)
        monkeypatch.setattr(layer, "_flash", flash)
        monkeypatch.setattr(layer, "_visible", recorded)
        found = _by_ranks(layer, x, LENGTHS, cu_seqlens, context.parts)
    needed = name == "window_both" if dtype in HALF else name != "both" or packed
    assert any(mask.numel() for mask in masks) == needed
    bound = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * expected.abs().max().item())
    dy = torch.randn_like(expected)
    theirs, ours = (torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True) for y in (expected, found))
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=bound * wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("name", ["plain", "shared", "window", "both"])
def test_memory(name, packed):
    """Far from that of a mask, which has 2**29 bytes here and is made of distances eight times as large."""
    lengths = (2**16 - 2**13, 2**13)
    layer = Attention(64, 4, **OPTIONS[name], device="cuda")
    x = torch.randn(1, sum(lengths), 64, device="cuda")
    cu_seqlens = torch.tensor([0, 1000, sum(lengths)], device="cuda") if packed else None
    layer.context = context = Recording()
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            layer(x, cu_seqlens=cu_seqlens)
        layer.context = Rank(1, lengths, context.parts)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x[:, lengths[0] :], cu_seqlens=cu_seqlens).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
