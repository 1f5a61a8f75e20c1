"""Numba kernels: one thread walks the sequence for one batch row and one head, or some heads of a group.

The state lies in a buffer (n, p): its inner loops run along the channels of a head, which the compiler vectorises, and
need no sum across a vector. A state belongs to a sequence, so packing costs one test for each token.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from ssmscan.ops._numba.parallel import empty, run
from ssmscan.shapes import state_dtype

# Steps between two states that the backward keeps, and whose states it keeps all in turn.
SPAN = 32
# Parts of a group's heads, each of which sums its own dB and dC: for as many threads, and the same for any number.
PARTS = 8


@njit(nogil=True, cache=True, error_model="numpy")
def _load(h, states, s, head):
    for j in range(h.shape[0]):
        for i in range(h.shape[1]):
            h[j, i] = states[s, head, i, j]


@njit(nogil=True, cache=True, error_model="numpy")
def _store(h, states, s, head):
    for i in range(h.shape[1]):
        for j in range(h.shape[0]):
            states[s, head, i, j] = h[j, i]


@njit(nogil=True, cache=True, error_model="numpy")
def _advance(h, after, decay, u, B):
    """after = decay·h + B⊗u; the two may be the same."""
    for j in range(h.shape[0]):
        b, hj, aj = B[j], h[j], after[j]
        for i in range(u.shape[0]):
            aj[i] = decay * hj[i] + b * u[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _forward(x, delta, decay, B, C, owner, final, y, l, per_group, reverse, batch, head):
    n, p = B.shape[3], x.shape[3]
    group = head // per_group
    h, u, out = np.empty((n, p), y.dtype), np.empty(p, y.dtype), np.empty(p, y.dtype)
    now = -1
    for k in range(l):
        t = l - 1 - k if reverse else k
        s = batch if owner.size == 0 else owner[t]
        if s != now:
            if now >= 0:
                _store(h, final, now, head)
            _load(h, final, s, head)
            now = s
        d, a = delta[batch, t, head], decay[batch, t, head]
        xt, bt, ct = x[batch, t, head], B[batch, t, group], C[batch, t, group]
        for i in range(p):
            u[i] = d * xt[i]
            out[i] = 0
        # Four rows at once, so that the sums are read and written a quarter as often.
        for j in range(0, n // 4 * 4, 4):
            b0, b1, b2, b3 = bt[j], bt[j + 1], bt[j + 2], bt[j + 3]
            c0, c1, c2, c3 = ct[j], ct[j + 1], ct[j + 2], ct[j + 3]
            h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
            for i in range(p):
                v0 = a * h0[i] + b0 * u[i]
                v1 = a * h1[i] + b1 * u[i]
                v2 = a * h2[i] + b2 * u[i]
                v3 = a * h3[i] + b3 * u[i]
                h0[i], h1[i], h2[i], h3[i] = v0, v1, v2, v3
                out[i] += (c0 * v0 + c1 * v1) + (c2 * v2 + c3 * v3)
        for j in range(n // 4 * 4, n):
            bj, cj, hj = bt[j], ct[j], h[j]
            for i in range(p):
                hj[i] = a * hj[i] + bj * u[i]
                out[i] += cj * hj[i]
        yt = y[batch, t, head]
        for i in range(p):
            yt[i] = out[i]
    if now >= 0:
        _store(h, final, now, head)


@njit(nogil=True, cache=True, error_model="numpy")
def _backward(
    x, delta, decay, B, C, dy, owner, initial, g, dx, ddelta, dlog, dB, dC, l, per_group, reverse,
    part, batch, first, end,
):  # fmt: skip
    """The heads from ``first`` to ``end``, all of one group; ``g`` holds the adjoints of the final states."""
    n, p = B.shape[3], x.shape[3]
    spans = (l + SPAN - 1) // SPAN
    kept, hs = np.empty((spans, n, p), x.dtype), np.empty((SPAN + 1, n, p), x.dtype)
    adjoint, u, v = np.empty((n, p), x.dtype), np.empty(p, x.dtype), np.empty(p, x.dtype)
    group = first // per_group
    dBs, dCs = dB[part, batch], dC[part, batch]
    for t in range(l):
        for j in range(n):
            dBs[t, group, j] = 0
            dCs[t, group, j] = 0
    for head in range(first, end):
        now = -1
        h = hs[0]
        for k in range(l):
            t = l - 1 - k if reverse else k
            s = batch if owner.size == 0 else owner[t]
            if s != now:
                _load(h, initial, s, head)
                now = s
            if k % SPAN == 0:
                kept[k // SPAN] = h
            for i in range(p):
                u[i] = delta[batch, t, head] * x[batch, t, head, i]
            _advance(h, h, decay[batch, t, head], u, B[batch, t, group])
        now = -1
        for span in range(spans - 1, -1, -1):
            start, stop = span * SPAN, min((span + 1) * SPAN, l)
            hs[0] = kept[span]
            for k in range(start, stop):
                t = l - 1 - k if reverse else k
                if owner.size > 0 and k > start and owner[t] != owner[t + 1 if reverse else t - 1]:
                    _load(hs[k - start], initial, owner[t], head)
                for i in range(p):
                    u[i] = delta[batch, t, head] * x[batch, t, head, i]
                _advance(hs[k - start], hs[k - start + 1], decay[batch, t, head], u, B[batch, t, group])
                # A sequence's last state is overwritten by the first of the next; what it gives to dC is taken here.
                for j in range(n):
                    total, row = u[0] * 0, hs[k - start + 1, j]
                    for i in range(p):
                        total += dy[batch, t, head, i] * row[i]
                    dCs[t, group, j] += total
            for k in range(stop - 1, start - 1, -1):
                t = l - 1 - k if reverse else k
                s = batch if owner.size == 0 else owner[t]
                if s != now:
                    if now >= 0:
                        _store(adjoint, g, now, head)
                    _load(adjoint, g, s, head)
                    now = s
                d, a = delta[batch, t, head], decay[batch, t, head]
                xt, dyt, h = x[batch, t, head], dy[batch, t, head], hs[k - start]
                bt, ct = B[batch, t, group], C[batch, t, group]
                flow = d * 0
                for i in range(p):
                    v[i] = 0
                for j in range(n):
                    gj, hj, bj, cj = adjoint[j], h[j], bt[j], ct[j]
                    total, passing = d * 0, d * 0
                    for i in range(p):
                        value = gj[i] + cj * dyt[i]
                        v[i] += bj * value
                        total += value * xt[i]
                        passing += value * hj[i]
                        gj[i] = a * value
                    dBs[t, group, j] += d * total
                    flow += passing
                own = d * 0
                for i in range(p):
                    own += v[i] * xt[i]
                    dx[batch, t, head, i] = d * v[i]
                ddelta[batch, t, head] = own
                dlog[batch, t, head] = a * flow
        if now >= 0:
            _store(adjoint, g, now, head)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, l, heads, p = x.shape
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    shape = (batch, heads, p, B.shape[3]) if h0 is None else h0.shape
    final = torch.zeros(shape, dtype=dtype) if h0 is None else torch.empty(shape, dtype=dtype).copy_(h0)
    delta = _step_sizes(dt, dt_bias, dtype, softplus, low, high)
    y = empty(batch, l, heads, p, dtype=dtype)
    parts = [(i, head) for i in range(batch) for head in range(heads)]
    inputs = _arrays(dtype, x, delta, (delta * A.to(dtype)).exp(), B, C)
    run(_forward, parts, *inputs, _owner(sequence), final.numpy(), y.numpy(), l, _per_group(x, B), reverse)
    if D is not None:
        y.addcmul_(D.to(dtype).view(heads, -1), x.to(dtype))
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype), final


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
    initial: bool,
) -> tuple[Tensor, ...]:
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    wide = x.to(dtype)
    dy = dy.to(dtype)
    dz = x.new_empty(0)
    if z is not None:
        y, _ = forward(wide, dt, A, B, C, D, None, dt_bias, h0, sequence, softplus, low, high, reverse)
        gate = z.to(dtype)
        sigmoid = gate.sigmoid()
        dz = z.new_empty(z.shape).copy_(dy * y * sigmoid * (1 + gate * (1 - sigmoid)))
        dy = dy * gate * sigmoid
    shape = (batch, heads, p, n) if h0 is None else h0.shape
    start = torch.zeros(shape, dtype=dtype) if h0 is None else h0.to(dtype)
    g = torch.zeros(shape, dtype=dtype) if dh is None else torch.empty(shape, dtype=dtype).copy_(dh)
    per_group = _per_group(x, B)
    size = -(-per_group // PARTS)
    parts = [
        (part, i, group * per_group + part * size, min(group * per_group + (part + 1) * size, (group + 1) * per_group))
        for i in range(batch)
        for group in range(groups)
        for part in range(-(-per_group // size))
    ]
    dx = empty(batch, l, heads, p, dtype=dtype)
    ddelta, dlog = empty(2, batch, l, heads, dtype=dtype)
    dB, dC = empty(2, -(-per_group // size), batch, l, groups, n, dtype=dtype)
    delta = _step_sizes(dt, dt_bias, dtype, softplus, low, high)
    inputs = _arrays(dtype, wide, delta, (delta * A.to(dtype)).exp(), B, C, dy)
    outputs = (v.numpy() for v in (g, dx, ddelta, dlog, dB, dC))
    run(_backward, parts, *inputs, _owner(sequence), start.numpy(), *outputs, l, per_group, reverse)
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    before = F.softplus(raw) if softplus else raw
    slope = ((before >= low) & (before <= high)).to(dtype)
    if softplus:
        slope *= torch.where(raw > 20, 1, raw.sigmoid())
    ddt = slope.mul_(ddelta.addcmul_(A.to(dtype), dlog))
    dD = torch.empty(0)
    if D is not None:
        dx.addcmul_(D.to(dtype).view(heads, -1), dy)
        dD = _like(D, (dy * wide).sum((0, 1) if D.dim() == 2 else (0, 1, 3)))
    dbias = torch.empty(0) if dt_bias is None else _like(dt_bias, ddt.sum((0, 1)))
    dA = _like(A, dlog.mul_(delta).sum((0, 1)))
    dh0 = g if initial else torch.empty(0, dtype=dtype)
    sums = (_like(t, v.sum(0)) for t, v in ((B, dB), (C, dC)))
    return dx.to(x.dtype), _like(dt, ddt), dA, *sums, dD, dz, dbias, dh0


def _step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dtype: torch.dtype, softplus: bool, low: float, high: float
) -> Tensor:
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    return (F.softplus(delta) if softplus else delta).clamp(low, high)


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    """Their rows of channels or states without gaps, as the inner loops want them."""
    return [v.detach().to(dtype).contiguous().numpy() for v in tensors]


def _like(tensor: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(gradient)


def _per_group(x: Tensor, B: Tensor) -> int:
    return x.shape[2] // B.shape[2]


def _owner(sequence: Tensor | None) -> np.ndarray:
    """The sequence number of each token; empty without packing."""
    return np.empty(0, np.int32) if sequence is None else sequence.numpy()
