"""The diagonal recurrence h = a·h + u in plain PyTorch, differentiable any number of times, on any device.

The length is cut into chunks of 16 steps. All chunks advance together, one step at a time, with zero initial state;
what enters each chunk is the same scan over the chunks' totals. So 16 steps of Python make a level and a sequence of
2^24 has six levels. Only products of decays occur, never a quotient, so any decay is safe, zero and negative too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.packing import first_tokens, last_tokens

CHUNK = 16


def recurrence(a: Tensor, u: Tensor, h: Tensor, sequence: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """All states from the initial h on, in the shape (b, l, ...) of u, with which a broadcasts, and the final ones."""
    if u.shape[1] == 0:
        return a * u, h.clone()
    if sequence is None:
        hs = _directed(a, u, None, h, reverse)
        return hs, hs[:, 0 if reverse else -1].clone()
    start = first_tokens(sequence, reverse)
    u = torch.where(_beside(start, u), a * h[sequence] + u, u)
    hs = _directed(a, u, start, torch.zeros_like(u[:, 0]), reverse)
    token, empty = last_tokens(sequence, h.shape[0], reverse)
    return hs, torch.where(_beside(empty, u), h, hs[0, token])


def _beside(flags: Tensor, u: Tensor) -> Tensor:
    """One flag for all that u (b, l, ...) holds for a token, or h for a sequence."""
    return flags.view(-1, *(1,) * (u.dim() - 2))


def _directed(a: Tensor, u: Tensor, start: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    if not reverse:
        return _scan(a, u, start, h)
    return _scan(a.flip(1), u.flip(1), None if start is None else start.flip(0), h).flip(1)


def _scan(a: Tensor, u: Tensor, start: Tensor | None, h: Tensor) -> Tensor:
    """All states (b, l, ...) of h = a·h + u, where a token with ``start`` forgets what came before it."""
    l = u.shape[1]
    n = (l + CHUNK - 1) // CHUNK
    pad = n * CHUNK - l
    a, u = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)).unflatten(1, (n, CHUNK)) for v in (a, u))
    if start is not None:
        start = F.pad(start, (0, pad)).view(n, CHUNK, *(1,) * (u.dim() - 3))
    p, s = torch.ones_like(a[:, :, 0]), torch.zeros_like(u[:, :, 0])
    products, sums = [], []
    for i in range(CHUNK):
        if start is not None:
            # Not by a decay of zero: 0·NaN would carry a NaN into the next packed sequence, or its gradient back.
            p, s = torch.where(start[:, i], 0, p), torch.where(start[:, i], 0, s)
        p = a[:, :, i] * p
        s = a[:, :, i] * s + u[:, :, i]
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
