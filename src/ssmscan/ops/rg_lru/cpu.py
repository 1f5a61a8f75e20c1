"""Numba kernels: one thread walks the sequence for one batch row and a range of channels.

Gates, decays and square roots are PyTorch's, which computes exponentials in vectors. Each inner loop runs along the
channels and writes one array, so that the compiler vectorises it too. A state row belongs to a sequence, so packing
needs no special case.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, owners, row, rows
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split
from ssmscan.ops.packing import first_tokens
from ssmscan.ops.rg_lru.autograd import SPAN, Inputs, Options
from ssmscan.shapes import state_dtype


@compiled
def _forward(x, gi, a, gain, strides, owner, h, y, states, l, reverse, i, first, end):
    for k in range(l):
        t = l - 1 - k if reverse else k
        hr = h[i if owner.size == 0 else owner[t], first:end]
        if states.size > 0 and k % SPAN == 0:
            states[i, k // SPAN, first:end] = hr
        xr = row(x, strides[0], i, t, first, end)
        gir = row(gi, strides[1], i, t, first, end)
        ar = row(a, strides[2], i, t, first, end)
        sr = row(gain, strides[3], i, t, first, end)
        yr = y[i, t, first:end]
        for j in range(end - first):
            hr[j] = ar[j] * hr[j] + sr[j] * gir[j] * xr[j]
        for j in range(end - first):
            yr[j] = hr[j]


@compiled
def _backward(
    x, gi, a, gain, gr, dy, strides, rate, owner, unscaled, h0, states, g, dx, di, dr, slopes, l, reverse, i, first, end
):
    width = end - first
    # Before each step, after its decay.
    decayed = np.empty((SPAN, width), g.dtype)
    h, slope, dlog_a = np.empty(width, g.dtype), np.zeros(width, g.dtype), np.empty(width, g.dtype)
    # Of the arrays' own type, lest the arithmetic widen.
    one, limit = g.dtype.type(1), g.dtype.type(1e-3)
    rates = rate[first:end]
    for span in range((l + SPAN - 1) // SPAN - 1, -1, -1):
        start, stop = span * SPAN, min((span + 1) * SPAN, l)
        h[:] = states[i, span, first:end]
        for k in range(start, stop):
            t = l - 1 - k if reverse else k
            if owner.size > 0 and k > start and owner[t] != owner[t + 1 if reverse else t - 1]:
                h[:] = h0[owner[t], first:end]
            xr = row(x, strides[0], i, t, first, end)
            gir = row(gi, strides[1], i, t, first, end)
            ar = row(a, strides[2], i, t, first, end)
            sr = row(gain, strides[3], i, t, first, end)
            hr = decayed[k - start]
            for j in range(width):
                hr[j] = ar[j] * h[j]
            for j in range(width):
                h[j] = hr[j] + sr[j] * gir[j] * xr[j]
        for k in range(stop - 1, start - 1, -1):
            t = l - 1 - k if reverse else k
            gs, hr = g[i if owner.size == 0 else owner[t], first:end], decayed[k - start]
            xr = row(x, strides[0], i, t, first, end)
            gir = row(gi, strides[1], i, t, first, end)
            ar = row(a, strides[2], i, t, first, end)
            sr = row(gain, strides[3], i, t, first, end)
            grr = row(gr, strides[4], i, t, first, end)
            dyr = row(dy, strides[5], i, t, first, end)
            for j in range(width):
                gs[j] += dyr[j]
            if dx.size > 0:
                dxr = dx[i, t, first:end]
                for j in range(width):
                    dxr[j] = gs[j] * sr[j] * gir[j]
            if di.size > 0:
                dir_ = di[i, t, first:end]
                for j in range(width):
                    dir_[j] = gs[j] * sr[j] * xr[j] * gir[j] * (one - gir[j])
            if unscaled.size > 0 and unscaled[t]:
                # No state decays before a first token, nor does its gain depend on the decay.
                dlog_a[:] = 0
            else:
                for j in range(width):
                    dlog_a[j] = gs[j] * (hr[j] - xr[j] * gir[j] * ar[j] * ar[j] / max(sr[j], limit))
            if dr.size > 0:
                drr = dr[i, t, first:end]
                for j in range(width):
                    drr[j] = -rates[j] * dlog_a[j] * grr[j] * (one - grr[j])
            for j in range(width):
                slope[j] += dlog_a[j] * grr[j]
            for j in range(width):
                gs[j] *= ar[j]
    slopes[i, first:end] = slope


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, input_gate, recurrence_gate, a_param, h0, sequence = inputs
    reverse, scale_first = options
    batch, l, d = x.shape
    dtype = state_dtype(x, input_gate, recurrence_gate, a_param, h0)
    h = filled((batch, d), dtype, h0)
    y = empty(batch, l, d, dtype=dtype)
    states = empty(batch if save else 0, -(-l // SPAN), d, dtype=dtype)
    unscaled = _unscaled(sequence, l, reverse, scale_first)
    gi, _, a, gain = _gates(input_gate, recurrence_gate, _rate(a_param, dtype), unscaled)
    arrays, strides = rows((x, gi, a, gain), x.shape, dtype)
    run(
        _forward,
        split(batch, d),
        *arrays,
        strides,
        owners(sequence),
        h.numpy(),
        y.numpy(),
        states.numpy(),
        l,
        reverse,
    )
    return y.to(x.dtype), h, states


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, input_gate, recurrence_gate, a_param, h0, sequence = inputs
    reverse, scale_first = options
    batch, l, d = x.shape
    dtype = states.dtype
    rate = _rate(a_param, dtype)
    unscaled = _unscaled(sequence, l, reverse, scale_first)
    gi, gr, a, gain = _gates(input_gate, recurrence_gate, rate, unscaled)
    arrays, strides = rows((x, gi, a, gain, gr, dy), x.shape, dtype)
    g = filled((batch if h0 is None else h0.shape[0], d), dtype, dh)
    start = empty(0, d, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()
    dx, di, dr = (empty(batch if need else 0, l, d, dtype=dtype) for need in needs[:3])
    slopes = empty(batch, d, dtype=dtype)
    run(
        _backward,
        split(batch, d),
        *arrays,
        strides,
        rate.numpy(),
        owners(sequence),
        np.empty(0, np.bool_) if unscaled is None else unscaled.numpy(),
        start.numpy(),
        states.numpy(),
        g.numpy(),
        *(v.numpy() for v in (dx, di, dr, slopes)),
        l,
        reverse,
    )
    da_param = empty(d if needs[3] else 0, dtype=dtype)
    if needs[3]:
        torch.mul(slopes.sum(0), -8 * a_param.to(dtype).sigmoid(), out=da_param)
    return (
        dx.to(x.dtype),
        di.to(input_gate.dtype),
        dr.to(recurrence_gate.dtype),
        da_param.to(a_param.dtype),
        g if h0 is not None else g[:0],
    )


def _rate(a_param: Tensor, dtype: torch.dtype) -> Tensor:
    """How fast the state of each channel decays while its gate is open."""
    return 8 * F.softplus(a_param.to(dtype))


def _gates(
    input_gate: Tensor, recurrence_gate: Tensor, rate: Tensor, unscaled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gates open, a, and √(1 − a²) or where a token is ``unscaled`` 1."""
    gi, gr = input_gate.to(rate.dtype).sigmoid(), recurrence_gate.to(rate.dtype).sigmoid()
    log_a = -rate * gr
    gain = (2 * log_a).expm1_().neg_().sqrt_()
    if unscaled is not None:
        gain.masked_fill_(unscaled[:, None], 1)
    return gi, gr, log_a.exp(), gain


def _unscaled(sequence: Tensor | None, l: int, reverse: bool, scale_first: bool) -> Tensor | None:
    """Which tokens, (l,) bool, come first in their sequence and are not to be scaled; None if all are."""
    if scale_first:
        return None
    one = torch.zeros(l, dtype=torch.int32, device="cpu")
    return first_tokens(one if sequence is None else sequence, reverse)
