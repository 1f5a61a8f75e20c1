"""Numba kernels: one thread walks the sequence for one batch row and a range of the state's rows.

Each inner loop runs along the columns, so that the compiler vectorises it; a matrix is a flat row of r·c numbers. A
state belongs to a sequence, so packing needs no special case.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, owners, rows
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split
from ssmscan.ops.matrix_scan.autograd import SPAN, Inputs, Options
from ssmscan.shapes import state_dtype


@compiled
def _forward(x, a, strides, owner, h, y, states, l, c, reverse, i, first, end):
    for k in range(l):
        t = l - 1 - k if reverse else k
        sequence = i if owner.size == 0 else owner[t]
        if states.size > 0 and k % SPAN == 0:
            states[i, k // SPAN, first * c : end * c] = h[sequence, first * c : end * c]
        for row in range(first, end):
            decay = a[i * strides[1, 0] + t * strides[1, 1] + row]
            begin = i * strides[0, 0] + t * strides[0, 1] + row * c
            xr = x[begin : begin + c]
            hr, yr = h[sequence, row * c : row * c + c], y[i, t, row * c : row * c + c]
            for j in range(c):
                hr[j] = decay * hr[j] + xr[j]
            for j in range(c):
                yr[j] = hr[j]


# In any order, and so in vectors.
@compiled(fastmath={"reassoc"})
def _dot(p, q):
    total = p.dtype.type(0)
    for j in range(p.size):
        total += p[j] * q[j]
    return total


@compiled
def _backward(x, a, dy, strides, owner, h0, states, g, dx, da, l, c, reverse, i, first, end):
    # Before each step, after its decay.
    decayed = np.empty((SPAN, c), g.dtype)
    h = np.empty(c, g.dtype)
    for span in range((l + SPAN - 1) // SPAN - 1, -1, -1):
        start, stop = span * SPAN, min((span + 1) * SPAN, l)
        for row in range(first, end):
            left, right = row * c, row * c + c
            h[:] = states[i, span, left:right]
            for k in range(start, stop):
                t = l - 1 - k if reverse else k
                if owner.size > 0 and k > start and owner[t] != owner[t + 1 if reverse else t - 1]:
                    h[:] = h0[owner[t], left:right]
                decay = a[i * strides[1, 0] + t * strides[1, 1] + row]
                begin = i * strides[0, 0] + t * strides[0, 1] + left
                xr, dr = x[begin : begin + c], decayed[k - start]
                for j in range(c):
                    dr[j] = decay * h[j]
                for j in range(c):
                    h[j] = dr[j] + xr[j]
            for k in range(stop - 1, start - 1, -1):
                t = l - 1 - k if reverse else k
                decay = a[i * strides[1, 0] + t * strides[1, 1] + row]
                begin = i * strides[2, 0] + t * strides[2, 1] + left
                dyr, dr = dy[begin : begin + c], decayed[k - start]
                gr = g[i if owner.size == 0 else owner[t], left:right]
                for j in range(c):
                    gr[j] += dyr[j]
                if dx.size > 0:
                    dx[i, t, left:right] = gr
                if da.size > 0:
                    da[i, t, row] = _dot(gr, dr)
                for j in range(c):
                    gr[j] *= decay


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, log_a, h0, sequence = inputs
    (reverse,) = options
    batch, l, r, c = x.shape
    dtype = state_dtype(x, log_a, h0)
    h = filled((batch, r, c), dtype, h0)
    y = empty(batch, l, r, c, dtype=dtype)
    states = empty(batch if save else 0, -(-l // SPAN), r, c, dtype=dtype)
    arrays, strides = rows((x.flatten(2), log_a.to(dtype).exp()), x.shape, dtype)
    run(
        _forward,
        _parts(batch, r, c),
        *arrays,
        strides,
        owners(sequence),
        h.flatten(1).numpy(),
        y.flatten(2).numpy(),
        states.flatten(2).numpy(),
        l,
        c,
        reverse,
    )
    return y.to(x.dtype), h, states


def backward(
    inputs: Inputs, states: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, log_a, h0, sequence = inputs
    (reverse,) = options
    batch, l, r, c = x.shape
    dtype = states.dtype
    arrays, strides = rows((x.flatten(2), log_a.to(dtype).exp(), dy.flatten(2)), x.shape, dtype)
    g = filled((batch if h0 is None else h0.shape[0], r, c), dtype, dh)
    start = empty(0, r, c, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()
    dx = empty(batch if needs[0] else 0, l, r, c, dtype=dtype)
    dlog_a = empty(batch if needs[1] else 0, l, r, dtype=dtype)
    run(
        _backward,
        _parts(batch, r, c),
        *arrays,
        strides,
        owners(sequence),
        start.flatten(1).numpy(),
        states.flatten(2).numpy(),
        g.flatten(1).numpy(),
        dx.flatten(2).numpy(),
        dlog_a.numpy(),
        l,
        c,
        reverse,
    )
    return dx.to(x.dtype), dlog_a.to(log_a.dtype), g if h0 is not None else g[:0]


def _parts(batch: int, r: int, c: int) -> list[tuple[int, int, int]]:
    return split(batch, r, widest=max(4096 // max(c, 1), 1), narrowest=1)
