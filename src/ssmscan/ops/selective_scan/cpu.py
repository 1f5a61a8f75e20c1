"""Numba kernels: one thread walks the sequence for one batch row and a range of channels of one group.

Each inner loop runs along at most WIDTH channels and writes one array, so that the compiler vectorises it, and all
states of these channels stay in the cache. A state row belongs to a sequence, so packing needs no special case.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, owners, row, rows, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run
from ssmscan.ops.selective_scan.autograd import SPAN, Inputs, Options
from ssmscan.shapes import state_dtype

# Channels that a thread walks together.
WIDTH = 64


def exponential(out, bits, v):
    """out = exp(v), along rows, of which none may be another; bits and v are lost.

    The library's exponential is a call, which does not vectorise.
    """
    raise NotImplementedError


@overload(exponential, jit_options={"error_model": "numpy"})
def _overload_exp(out, bits, v):
    if out.dtype.bitwidth == 64:

        def exact(out, bits, v):
            for j in range(v.shape[0]):
                out[j] = math.exp(v[j])

        return exact

    def polynomial(out, bits, v):
        # 2^(whole + part): the whole goes into the exponent's bits, the part, within 1/2, into a polynomial.
        scale = bits.view(np.float32)
        for j in range(v.shape[0]):
            w = v[j] * np.float32(1.4426950408889634)
            w = w if w > np.float32(-126.0) else np.float32(-126.0)
            w = w if w < np.float32(127.0) else np.float32(127.0)
            whole = math.floor(w + np.float32(0.5))
            part = np.float32(w - whole)
            p = np.float32(1.54614447e-04) * part + np.float32(1.34004282e-03)
            p = p * part + np.float32(9.61805668e-03)
            p = p * part + np.float32(5.55032723e-02)
            p = p * part + np.float32(2.40226509e-01)
            p = p * part + np.float32(6.93147207e-01)
            out[j] = p * part + np.float32(1.0)
            bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        for j in range(v.shape[0]):
            e = out[j] * scale[j]
            e = np.float32(0.0) if v[j] < np.float32(-87.3) else e
            e = np.float32(np.inf) if v[j] > np.float32(88.7) else e
            out[j] = e if v[j] == v[j] else v[j]

    return polynomial


def _softplus(out, scratch, bits, v):
    """out = log(1 + exp(v)), along rows; bits and scratch are lost."""
    raise NotImplementedError


@overload(_softplus, jit_options={"error_model": "numpy"})
def _overload_softplus(out, scratch, bits, v):
    if out.dtype.bitwidth == 64:

        def exact(out, scratch, bits, v):
            for j in range(v.shape[0]):
                out[j] = max(v[j], 0.0) + math.log1p(math.exp(-abs(v[j])))

        return exact

    def polynomial(out, scratch, bits, v):
        # log1p(e) = 2·atanh(e / (2 + e)), in powers of the square of that quotient.
        for j in range(v.shape[0]):
            scratch[j] = -abs(v[j])
        exponential(out, bits, scratch)
        for j in range(v.shape[0]):
            s = out[j] / (np.float32(2.0) + out[j])
            p = np.float32(0.28157778) * s * s + np.float32(0.27965158)
            p = p * s * s + np.float32(0.40024595)
            p = p * s * s + np.float32(0.66666322)
            p = p * s * s + np.float32(2.0)
            out[j] = (v[j] if v[j] > np.float32(0.0) else np.float32(0.0)) + s * p

    return polynomial


@compiled
def _sigmoid(out, scratch, bits, v):
    for j in range(v.shape[0]):
        scratch[j] = -v[j]
    exponential(out, bits, scratch)
    for j in range(v.shape[0]):
        out[j] = 1 / (1 + out[j])


# Sums may be taken in vectors; the order is still the same every time.
@compiled(fastmath={"reassoc", "contract"})
def _dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@compiled
def step_size(delta, v, scratch, bits, dt, bias, softplus):
    for j in range(dt.shape[0]):
        v[j] = dt[j] + bias[j]
    if softplus:
        _softplus(delta, scratch, bits, v)
    else:
        delta[:] = v


@compiled
def _advance(h, decay, scratch, bits, a, delta, u, B):
    """h = exp(δ·A)·h + B·u for the states of all channels, [n, width]; the decay is kept."""
    for k in range(a.shape[0]):
        ak, row = a[k], scratch[k * delta.shape[0] : (k + 1) * delta.shape[0]]
        for j in range(delta.shape[0]):
            row[j] = ak[j] * delta[j]
    exponential(decay.reshape(-1), bits, scratch)
    for k in range(a.shape[0]):
        hk, dk, Bk = h[k], decay[k], B[k]
        for j in range(delta.shape[0]):
            hk[j] = dk[j] * hk[j] + Bk * u[j]


@compiled
def _read(out, C, h):
    """out = C·h."""
    out[:] = 0
    for k in range(h.shape[0]):
        hk, Ck = h[k], C[k]
        for j in range(out.shape[0]):
            out[j] += Ck * hk[j]


@compiled
def _forward(
    x, dt, z, strides, A, B, C, D, bias, owner, h, y, saved, l, softplus, gated, reverse, i, group, first, end
):  # fmt: skip
    n, width = A.shape[0], end - first
    a, state, decay = A[:, first:end].copy(), np.empty((n, width), A.dtype), np.empty((n, width), A.dtype)
    delta, v, u, opened = np.empty((4, width), A.dtype)
    scratch, bits = np.empty(n * width, A.dtype), np.empty(n * width, np.int32)
    sequence = -1
    for step in range(l):
        t = l - 1 - step if reverse else step
        owned = i if owner.size == 0 else owner[t]
        if owned != sequence:
            if sequence >= 0:
                h[sequence, first:end] = state.T
            sequence = owned
            state[:] = h[sequence, first:end].T
        if saved.size > 0 and step % SPAN == 0:
            saved[i, step // SPAN, :, first:end] = state
        xr, yr = row(x, strides[0], i, t, first, end), y[i, t, first:end]
        dtr = row(dt, strides[1], i, t, first, end)
        step_size(delta, v, scratch[:width], bits[:width], dtr, bias[first:end], softplus)
        for j in range(width):
            u[j] = delta[j] * xr[j]
        _advance(state, decay, scratch, bits, a, delta, u, B[i, t, group])
        Cr, Dr = C[i, t, group], D[first:end] if D.size > 0 else D
        _read(yr, Cr, state)
        if D.size > 0:
            for j in range(width):
                yr[j] += Dr[j] * xr[j]
        if gated:
            zr = row(z, strides[2], i, t, first, end)
            _sigmoid(opened, scratch[:width], bits[:width], zr)
            for j in range(width):
                yr[j] *= zr[j] * opened[j]
    if sequence >= 0:
        h[sequence, first:end] = state.T


@compiled
def _backward(
    x, dt, z, dy, strides, A, B, C, D, bias, owner, h0, saved, dh, dx, ddt, dz, dA, dB, dC, dD, dbias,
    l, softplus, gated, reverse, i, group, first, end, part,
):  # fmt: skip
    n, width = A.shape[0], end - first
    a, g, decays = A[:, first:end].copy(), np.empty((n, width), A.dtype), np.empty((SPAN, n, width), A.dtype)
    before, state = np.empty((SPAN, n, width), A.dtype), np.empty((n, width), A.dtype)
    deltas, vs = np.empty((SPAN, width), A.dtype), np.empty((SPAN, width), A.dtype)
    u, opened, out, into, grow, w = np.empty((6, width), A.dtype)
    scratch, bits = np.empty(n * width, A.dtype), np.empty(n * width, np.int32)
    dAr, dDr, dbr = dA[part, :, :width], dD[i, first:end], dbias[i, first:end]
    dAr[:] = 0
    dDr[:] = 0
    dbr[:] = 0
    Dr, br = D[first:end] if D.size > 0 else D, bias[first:end]
    sequence = -1
    for span in range((l + SPAN - 1) // SPAN - 1, -1, -1):
        start, stop = span * SPAN, min((span + 1) * SPAN, l)
        state[:] = saved[i, span, :, first:end]
        for step in range(start, stop):
            t = l - 1 - step if reverse else step
            at = step - start
            if owner.size > 0 and step > start and owner[t] != owner[t + 1 if reverse else t - 1]:
                state[:] = h0[owner[t], first:end].T
            before[at] = state
            xr = row(x, strides[0], i, t, first, end)
            dtr = row(dt, strides[1], i, t, first, end)
            step_size(deltas[at], vs[at], scratch[:width], bits[:width], dtr, br, softplus)
            for j in range(width):
                u[j] = deltas[at, j] * xr[j]
            _advance(state, decays[at], scratch, bits, a, deltas[at], u, B[i, t, group])
            w[:] = row(dy, strides[3], i, t, first, end)
            if gated:
                # The derivative of z·sigmoid(z).
                Cr, zr, dzr = C[i, t, group], row(z, strides[2], i, t, first, end), dz[i, t, first:end]
                _read(out, Cr, state)
                if D.size > 0:
                    for j in range(width):
                        out[j] += Dr[j] * xr[j]
                _sigmoid(opened, scratch[:width], bits[:width], zr)
                for j in range(width):
                    dzr[j] = w[j] * out[j] * opened[j] * (1 + zr[j] * (1 - opened[j]))
                for j in range(width):
                    w[j] *= zr[j] * opened[j]
            for k in range(n):
                dC[part, t, k] = _dot(w, state[k])
        for step in range(stop - 1, start - 1, -1):
            t = l - 1 - step if reverse else step
            at = step - start
            owned = i if owner.size == 0 else owner[t]
            if owned != sequence:
                if sequence >= 0:
                    dh[sequence, first:end] = g.T
                sequence = owned
                g[:] = dh[sequence, first:end].T
            xr, delta = row(x, strides[0], i, t, first, end), deltas[at]
            Br, Cr = B[i, t, group], C[i, t, group]
            w[:] = row(dy, strides[3], i, t, first, end)
            if gated:
                zr = row(z, strides[2], i, t, first, end)
                _sigmoid(opened, scratch[:width], bits[:width], zr)
                for j in range(width):
                    w[j] *= zr[j] * opened[j]
            for j in range(width):
                u[j] = delta[j] * xr[j]
            into[:] = 0
            grow[:] = 0
            for k in range(n):
                gk, ak, dAk, dk, hk, Bk, Ck = g[k], a[k], dAr[k], decays[at, k], before[at, k], Br[k], Cr[k]
                for j in range(width):
                    gk[j] += Ck * w[j]
                dB[part, t, k] = _dot(gk, u)
                for j in range(width):
                    into[j] += Bk * gk[j]
                for j in range(width):
                    gk[j] *= dk[j]
                for j in range(width):
                    grow[j] += gk[j] * hk[j] * ak[j]
                for j in range(width):
                    dAk[j] += gk[j] * hk[j] * delta[j]
            dxr, ddtr = dx[i, t, first:end], ddt[i, t, first:end]
            for j in range(width):
                dxr[j] = delta[j] * into[j]
            if D.size > 0:
                for j in range(width):
                    dxr[j] += Dr[j] * w[j]
                for j in range(width):
                    dDr[j] += w[j] * xr[j]
            for j in range(width):
                ddtr[j] = xr[j] * into[j] + grow[j]
            if softplus:
                _sigmoid(opened, scratch[:width], bits[:width], vs[at])
                for j in range(width):
                    ddtr[j] *= opened[j]
            for j in range(width):
                dbr[j] += ddtr[j]
    if sequence >= 0:
        dh[sequence, first:end] = g.T


def _parts(batch: int, groups: int, d: int) -> list[tuple[int, int, int, int]]:
    """Batch row, group, first channel and end."""
    per_group = d // groups
    return [
        (i, group, first, min(first + WIDTH, (group + 1) * per_group))
        for i in range(batch)
        for group in range(groups)
        for first in range(group * per_group, (group + 1) * per_group, WIDTH)
    ]


def _dense(tensor: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Empty when there is none."""
    return empty(0, dtype=dtype).numpy() if tensor is None else view(tensor.detach().to(dtype).contiguous())


def forward(inputs: Inputs, options: Options, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, reverse = options
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    h = filled((batch, d, n), dtype, h0)
    y = empty(batch, l, d, dtype=dtype)
    saved = empty(batch if save else 0, -(-l // SPAN), n, d, dtype=dtype)
    arrays, strides = rows((x, dt, x if z is None else z), x.shape, dtype)
    bias = filled((d,), dtype) if dt_bias is None else dt_bias
    run(
        _forward,
        _parts(batch, groups, d),
        *arrays,
        strides,
        *(_dense(t, dtype) for t in (A.T, B, C, D, bias)),
        owners(sequence),
        h.numpy(),
        y.numpy(),
        saved.numpy(),
        l,
        softplus,
        z is not None,
        reverse,
    )
    return y.to(x.dtype), h, saved


def backward(
    inputs: Inputs, saved: Tensor, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, reverse = options
    batch, l, d = x.shape
    groups, n = B.shape[2:]
    dtype = saved.dtype
    g = filled((batch if h0 is None else h0.shape[0], d, n), dtype, dh)
    arrays, strides = rows((x, dt, x if z is None else z, dy), x.shape, dtype)
    bias = filled((d,), dtype) if dt_bias is None else dt_bias
    start = empty(0, d, n, dtype=dtype) if h0 is None else h0
    parts = _parts(batch, groups, d)
    dx, ddt = (empty(batch, l, d, dtype=dtype) for _ in range(2))
    dz = empty(batch if z is not None else 0, l, d, dtype=dtype)
    # Of each part, to be summed in a fixed order.
    dA = empty(len(parts), n, WIDTH, dtype=dtype)
    dB, dC = (empty(len(parts), l, n, dtype=dtype) for _ in range(2))
    dD, dbias = (empty(batch, d, dtype=dtype) for _ in range(2))
    run(
        _backward,
        [(*part, number) for number, part in enumerate(parts)],
        *arrays,
        strides,
        *(_dense(t, dtype) for t in (A.T, B, C, D, bias)),
        owners(sequence),
        _dense(start, dtype),
        saved.numpy(),
        g.numpy(),
        *(v.numpy() for v in (dx, ddt, dz, dA, dB, dC, dD, dbias)),
        l,
        softplus,
        z is not None,
        reverse,
    )
    # The last part of a group may be narrower.
    per_group = d // groups
    pieces = -(-per_group // WIDTH)
    dA = dA.view(batch, groups, pieces, n, WIDTH).sum(0).movedim(2, 3).reshape(groups, pieces * WIDTH, n)
    dA = dA[:, :per_group].reshape(d, n)
    dB, dC = (v.view(batch, groups, pieces, l, n).sum(2).transpose(1, 2) for v in (dB, dC))
    given = [
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape).copy_(v)
        for v, t, need in zip(
            (dx, ddt, dA, dB, dC, dD.sum(0), dz, dbias.sum(0)), (x, dt, A, B, C, D, z, dt_bias), needs[:8], strict=True
        )
    ]
    return *given, g if h0 is not None else g[:0]
