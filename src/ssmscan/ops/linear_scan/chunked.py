"""The scan in plain PyTorch, differentiable any number of times, on any device.

The length is cut into chunks of 16 steps. All chunks advance together, one step at a time, with zero initial state;
what enters each chunk is the same scan over the chunks' totals. So 16 steps of Python make a level and a sequence of
2^24 has six levels. Only products of decays occur, never a quotient, so any decay is safe, zero and negative too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.packing import first_tokens, last_tokens
from ssmscan.shapes import state_dtype

CHUNK = 16


def linear_scan(
    x: Tensor,
    decay: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    log: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    dtype = state_dtype(x, decay, b, c, h0)
    h = x.new_zeros(batch, d, dtype=dtype) if h0 is None else h0.to(dtype)
    if l == 0:
        return x * 1, h
    a = decay.to(dtype).exp() if log else decay.to(dtype)
    u = x.to(dtype) if b is None else b.to(dtype) * x.to(dtype)
    if sequence is None:
        hs = _directed(a, u, None, h, reverse)
        final = hs[:, 0 if reverse else -1]
    else:
        start = first_tokens(sequence, reverse)
        u = torch.where(start[:, None], a * h[sequence] + u, u)
        hs = _directed(a, u, start, torch.zeros_like(u[:, 0]), reverse)
        token, empty = last_tokens(sequence, h.shape[0], reverse)
        final = torch.where(empty[:, None], h, hs[0, token])
    return (hs if c is None else c.to(dtype) * hs).to(x.dtype), final


def _directed(a: Tensor, u: Tensor, start: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    if not reverse:
        return _scan(a, u, start, h)
    return _scan(a.flip(1), u.flip(1), None if start is None else start.flip(0), h).flip(1)


def _scan(a: Tensor, u: Tensor, start: Tensor | None, h: Tensor) -> Tensor:
    """All states (b, l, d) of h = a·h + u, where a token with ``start`` forgets what came before it."""
    l = u.shape[1]
    n = (l + CHUNK - 1) // CHUNK
    pad = n * CHUNK - l
    a, u = (F.pad(v, (0, 0, 0, pad)).unflatten(1, (n, CHUNK)) for v in (a, u))
    if start is not None:
        start = F.pad(start, (0, pad)).view(n, CHUNK, 1)
        a = torch.where(start, 0, a)
    p, s = torch.ones_like(u[:, :, 0]), torch.zeros_like(u[:, :, 0])
    products, sums = [], []
    for i in range(CHUNK):
        p = a[:, :, i] * p
        # Not by a = 0 alone: 0·NaN would carry a NaN into the next packed sequence.
        s = a[:, :, i] * (s if start is None else torch.where(start[:, i], 0, s)) + u[:, :, i]
        products.append(p)
        sums.append(s)
    product, total = torch.stack(products, 2), torch.stack(sums, 2)
    if n == 1:
        entering = h[:, None, None]
    else:
        forgets = None if start is None else start.any(1).view(n)
        # Padding makes the last chunk's totals wrong; nothing enters from it.
        totals = _scan(p, s, forgets, h)
        entering = torch.cat([h[:, None], totals[:, :-1]], 1)[:, :, None]
    if start is not None:
        entering = torch.where(start.cumsum(1) > 0, 0, entering)
    return (total + product * entering).flatten(1, 2)[:, :l]
