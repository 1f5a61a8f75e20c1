"""Numba kernels: one thread goes over the rows of one batch row in a range of channels.

Each inner loop runs along the channels and writes one array, so that the compiler vectorises it. The activation and
its derivative are PyTorch's, whose exponential is vectorised too.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, rows, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split
from ssmscan.ops.causal_conv1d.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

# Rows whose products are summed before they go to the total: the error of a long sum in float32 grows with its length.
BLOCK = 256


@compiled
def _input(x, strides, h, i, sequence, low, high, p, reverse, first, end):
    """The input at position p of a sequence, in scan order; those before its start are in its state."""
    if p < 0:
        return h[sequence, h.shape[1] + p, first:end]
    start = i * strides[0] + (high - 1 - p if reverse else low + p) * strides[1]
    return x[start + first : start + end]


@compiled
def _forward(x, strides, h, taps, bias, bounds, z, hn, reverse, i, first, end):
    w, width = taps.shape[0], end - first
    for s in range(len(bounds) - 1):
        low, high = bounds[s], bounds[s + 1]
        sequence = i if len(bounds) == 2 else s
        for p in range(high - low):
            zr = z[i, high - 1 - p if reverse else low + p, first:end]
            x0 = _input(x, strides, h, i, sequence, low, high, p - w + 1, reverse, first, end)
            x1 = _input(x, strides, h, i, sequence, low, high, p - w + 2, reverse, first, end)
            w0, w1 = taps[0, first:end], taps[1, first:end]
            br = bias[first:end]
            for j in range(width):
                zr[j] = br[j] + w0[j] * x0[j] + w1[j] * x1[j]
            for k in range(2, w):
                xr = _input(x, strides, h, i, sequence, low, high, p - w + 1 + k, reverse, first, end)
                wr = taps[k, first:end]
                for j in range(width):
                    zr[j] += wr[j] * xr[j]
        for k in range(w - 1):
            xr = _input(x, strides, h, i, sequence, low, high, high - low - w + 1 + k, reverse, first, end)
            hr = hn[sequence, k, first:end]
            for j in range(width):
                hr[j] = xr[j]


@compiled
def _backward(x, dz, strides, h, taps, bounds, dh, dx, dh0, sums, reverse, i, first, end):
    w, width = taps.shape[0], end - first
    block = np.zeros((w + 1, width), x.dtype)
    filled = 0
    for s in range(len(bounds) - 1):
        low, high = bounds[s], bounds[s + 1]
        sequence = i if len(bounds) == 2 else s
        l = high - low
        for p in range(l - 1, -w, -1):
            # The gradient of the input at position p: of the outputs p to p + w - 1, and of the final state.
            if p < 0:
                if dh0.size == 0:
                    break
                out = dh0[sequence, w - 1 + p, first:end]
            else:
                t = high - 1 - p if reverse else low + p
                out = dx[i, t, first:end]
            if p >= 0 and sums.size > 0:
                dzr = _input(dz, strides[1], h, i, sequence, low, high, p, reverse, first, end)
                for k in range(w):
                    xr = _input(x, strides[0], h, i, sequence, low, high, p - w + 1 + k, reverse, first, end)
                    br = block[k]
                    for j in range(width):
                        br[j] += dzr[j] * xr[j]
                br = block[w]
                for j in range(width):
                    br[j] += dzr[j]
                filled += 1
                if filled % BLOCK == 0:
                    _flush(block, sums[i, :, first:end])
            if p >= l - w + 1 and dh.size > 0:
                out[:] = dh[sequence, p - l + w - 1, first:end]
            else:
                out[:] = 0
            for k in range(w - 1, -1, -1):
                q = p + w - 1 - k
                if 0 <= q < l:
                    dzr = _input(dz, strides[1], h, i, sequence, low, high, q, reverse, first, end)
                    wr = taps[k, first:end]
                    for j in range(width):
                        out[j] += wr[j] * dzr[j]
    if sums.size > 0:
        _flush(block, sums[i, :, first:end])


@compiled
def _flush(block, total):
    for k in range(block.shape[0]):
        for j in range(block.shape[1]):
            total[k, j] += block[k, j]
            block[k, j] = 0


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, weight, bias, h0, _, bounds = inputs
    silu, reverse = options
    dtype = state_dtype(x, weight, bias, h0)
    z, hn = _convolve(x, weight, bias, _state(x, weight, h0, bounds, dtype), bounds, reverse)
    return (F.silu(z, inplace=True) if silu else z).to(x.dtype), hn


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, bounds: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The value before the activation, and the final state, both in the dtype of the state h."""
    z, hn = empty(*x.shape, dtype=h.dtype), empty(*h.shape, dtype=h.dtype)
    (flat,), strides = rows((x,), x.shape, h.dtype)
    offset = x.new_zeros(x.shape[2], dtype=h.dtype) if bias is None else bias.to(h.dtype).contiguous()
    run(
        _forward,
        split(x.shape[0], x.shape[2]),
        flat,
        strides[0],
        h.numpy(),
        _taps(weight, h.dtype),
        view(offset),
        _bounds(bounds, x.shape[1]),
        z.numpy(),
        hn.numpy(),
        reverse,
    )
    return z, hn


def backward(
    inputs: Inputs, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, weight, bias, h0, _, bounds = inputs
    silu, reverse = options
    batch, l, d = x.shape
    w = weight.shape[1]
    dtype = state_dtype(x, weight, bias, h0)
    h = _state(x, weight, h0, bounds, dtype)
    dz = dy.to(dtype)
    if silu:
        z, _ = _convolve(x, weight, bias, h, bounds, reverse)
        dz = torch.ops.aten.silu_backward(dz, z)
    dx = empty(batch, l, d, dtype=dtype)
    dh0 = empty(0 if h0 is None else h.shape[0], w - 1, d, dtype=dtype)
    sums = filled((batch if needs[1] or needs[2] else 0, w + 1, d), torch.float64)
    (flat, flat_dz), strides = rows((x, dz), x.shape, dtype)
    gradient = empty(0, w - 1, d, dtype=dtype) if dh is None else dh.to(dtype).contiguous()
    run(
        _backward,
        split(batch, d),
        flat,
        flat_dz,
        strides,
        h.numpy(),
        _taps(weight, dtype),
        _bounds(bounds, l),
        gradient.numpy(),
        dx.numpy(),
        dh0.numpy(),
        sums.numpy(),
        reverse,
    )
    dweight = weight.new_empty(d if needs[1] else 0, w)
    dbias = (weight if bias is None else bias).new_empty(d if needs[2] else 0)
    total = sums.sum(0)
    if needs[1]:
        dweight.copy_(total[:w].t())
    if needs[2]:
        dbias.copy_(total[w])
    return dx.to(x.dtype) if needs[0] else x.new_empty(0, l, d), dweight, dbias, dh0


def _state(x: Tensor, weight: Tensor, h0: Tensor | None, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    if h0 is not None:
        return h0.to(dtype).contiguous()
    count = x.shape[0] if bounds is None else len(bounds) - 1
    return filled((count, weight.shape[1] - 1, x.shape[2]), dtype)


def _taps(weight: Tensor, dtype: torch.dtype) -> np.ndarray:
    """(w, d), for rows along the channels."""
    return view(weight.t().to(dtype).contiguous())


def _bounds(bounds: Tensor | None, l: int) -> np.ndarray:
    """Where each sequence begins, and the length; without packing one sequence in each batch row."""
    return np.array([0, l]) if bounds is None else bounds.numpy()
