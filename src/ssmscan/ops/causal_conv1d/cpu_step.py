"""The decode step in Numba: one thread convolves some channels of one batch row, or of all if few."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, read, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split_step
from ssmscan.ops.decoding import advance
from ssmscan.shapes import state_dtype

# Channels that are worth a call of the kernel.
LEAST = 4096


@compiled
def _token(x, weight, bias, h, y, begin, stop, first, end):
    rows, w = h.shape[1], weight.shape[1]
    for i in range(begin, stop):
        yr, xr = y[i, first:end], x[i, first:end]
        yr[:] = bias[first:end] if bias.size > 0 else np.zeros(end - first, y.dtype)
        for k in range(w - 1):
            hr = h[i, rows - (w - 1) + k, first:end]
            for j in range(end - first):
                yr[j] += weight[first + j, k] * hr[j]
        for j in range(end - first):
            yr[j] += weight[first + j, w - 1] * xr[j]
        for k in range(rows - 1):
            h[i, k, first:end] = h[i, k + 1, first:end]
        h[i, rows - 1, first:end] = xr


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, state_indices: Tensor | None, silu: bool
) -> Tensor:
    dtype = state_dtype(x, weight, bias, h)
    bias = empty(0, dtype=dtype) if bias is None else bias
    parameters = [view(t.detach().to(dtype).contiguous()) for t in (weight, bias)]

    def token(x, h):
        y = empty(*x.shape, dtype=dtype)
        run(_token, split_step(x.shape[0], x.shape[1], LEAST), read(x, dtype), *parameters, read(h, dtype), y.numpy())
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype), h

    return advance(token, (x,), h, state_indices, x.dim() == 3, dtype)
