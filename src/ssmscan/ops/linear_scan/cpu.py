"""Numba kernels: one thread walks the sequence for one batch row and a range of channels.

Each inner loop runs along the channels and writes one array, so that the compiler vectorises it. A missing gate is a
row of ones read with stride zero. A state row belongs to a sequence, so packing needs no special case.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, owners, row, rows
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split
from ssmscan.ops.linear_scan.autograd import SPAN, Inputs, Options
from ssmscan.shapes import state_dtype


@compiled
def _forward(x, a, b, c, strides, owner, h, y, states, l, d, reverse, i, first, end):
    width = end - first
    for k in range(l):
        t = l - 1 - k if reverse else k
        sequence = i if owner.size == 0 else owner[t]
        hr = h[sequence, first:end]
        if states.size > 0 and k % SPAN == 0:
            states[i, k // SPAN, first:end] = hr
        xr = row(x, strides[0], i, t, first, end)
        ar = row(a, strides[1], i, t, first, end)
        br = row(b, strides[2], i, t, first, end)
        cr = row(c, strides[3], i, t, first, end)
        yr = y[i, t, first:end]
        for j in range(width):
            hr[j] = ar[j] * hr[j] + br[j] * xr[j]
        for j in range(width):
            yr[j] = cr[j] * hr[j]


@compiled
def _backward(x, a, b, c, dy, strides, owner, h0, states, g, dx, da, db, dc, l, d, reverse, i, first, end):
    width = end - first
    before = np.empty((SPAN + 1, width), g.dtype)
    for span in range((l + SPAN - 1) // SPAN - 1, -1, -1):
        start, stop = span * SPAN, min((span + 1) * SPAN, l)
        before[0] = states[i, span, first:end]
        for k in range(start, stop):
            t = l - 1 - k if reverse else k
            if owner.size > 0 and k > start and owner[t] != owner[t + 1 if reverse else t - 1]:
                before[k - start] = h0[owner[t], first:end]
            hr, after = before[k - start], before[k - start + 1]
            xr = row(x, strides[0], i, t, first, end)
            ar = row(a, strides[1], i, t, first, end)
            br = row(b, strides[2], i, t, first, end)
            for j in range(width):
                after[j] = ar[j] * hr[j] + br[j] * xr[j]
            if dc.size > 0:
                dyr, dcr = row(dy, strides[4], i, t, first, end), dc[i, t, first:end]
                for j in range(width):
                    dcr[j] = dyr[j] * after[j]
        for k in range(stop - 1, start - 1, -1):
            t = l - 1 - k if reverse else k
            sequence = i if owner.size == 0 else owner[t]
            gr, hr = g[sequence, first:end], before[k - start]
            xr = row(x, strides[0], i, t, first, end)
            ar = row(a, strides[1], i, t, first, end)
            br = row(b, strides[2], i, t, first, end)
            cr = row(c, strides[3], i, t, first, end)
            dyr = row(dy, strides[4], i, t, first, end)
            for j in range(width):
                gr[j] += cr[j] * dyr[j]
            if dx.size > 0:
                dxr = dx[i, t, first:end]
                for j in range(width):
                    dxr[j] = gr[j] * br[j]
            if db.size > 0:
                dbr = db[i, t, first:end]
                for j in range(width):
                    dbr[j] = gr[j] * xr[j]
            if da.size > 0:
                dar = da[i, t, first:end]
                for j in range(width):
                    dar[j] = gr[j] * hr[j]
            for j in range(width):
                gr[j] *= ar[j]


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, decay, b, c, h0, sequence = inputs
    log, reverse = options
    batch, l, d = x.shape
    dtype = state_dtype(x, decay, b, c, h0)
    h = filled((batch, d), dtype, h0)
    y = empty(batch, l, d, dtype=dtype)
    states = empty(batch if save else 0, -(-l // SPAN), d, dtype=dtype)
    arrays, strides = rows((x, decay.exp() if log else decay, b, c), x.shape, dtype)
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
        d,
        reverse,
    )
    return y.to(x.dtype), h, states


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, decay, b, c, h0, sequence = inputs
    log, reverse = options
    batch, l, d = x.shape
    dtype = states.dtype
    a = decay.exp() if log else decay
    arrays, strides = rows((x, a, b, c, dy), x.shape, dtype)
    g = filled((batch if h0 is None else h0.shape[0], d), dtype, dh)
    start = empty(0, d, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()
    gradients = [empty(batch if need else 0, l, d, dtype=dtype) for need in needs[:4]]
    run(
        _backward,
        split(batch, d),
        *arrays,
        strides,
        owners(sequence),
        start.numpy(),
        states.numpy(),
        g.numpy(),
        *(v.numpy() for v in gradients),
        l,
        d,
        reverse,
    )
    if log and needs[1]:
        gradients[1] *= a
    dx, da, db, dc = (v.to(t.dtype) if t is not None else v for v, t in zip(gradients, (x, decay, b, c), strict=True))
    return dx, da, db, dc, g if h0 is not None else g[:0]
