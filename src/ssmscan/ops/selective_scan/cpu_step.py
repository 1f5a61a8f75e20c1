"""The decode step in Numba: one thread advances the states of some channels of one batch row, or of all if few."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, read, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split_step
from ssmscan.ops.decoding import advance
from ssmscan.ops.selective_scan.cpu import exponential, step_size
from ssmscan.shapes import state_dtype

# Channels that are worth a call of the kernel.
LEAST = 512


@compiled
def _decays(decay, delta, dt, A, bias, softplus, i, first, end):
    """Step sizes, and the decays of all states, of the channels of a part."""
    width, n = end - first, A.shape[1]
    v, rest = np.empty((2, width), A.dtype)
    scratch, bits = np.empty(width * n, A.dtype), np.empty(width * n, np.int32)
    step_size(delta, v, rest, bits[:width], dt[i, first:end], bias[first:end], softplus)
    for j in range(width):
        for k in range(n):
            scratch[j * n + k] = delta[j] * A[first + j, k]
    exponential(decay, bits, scratch)


# Sums may be taken in vectors; the order is still the same every time.
@compiled(fastmath={"reassoc", "contract"})
def _token(x, dt, B, C, h, y, A, D, bias, softplus, begin, stop, first, end):
    width, n = end - first, A.shape[1]
    per_group = A.shape[0] // B.shape[1]
    delta, decay = np.empty(width, A.dtype), np.empty(width * n, A.dtype)
    for i in range(begin, stop):
        _decays(decay, delta, dt, A, bias, softplus, i, first, end)
        for j in range(width):
            d = first + j
            g = d // per_group
            u = delta[j] * x[i, d]
            total = u * 0
            for k in range(n):
                after = decay[j * n + k] * h[i, d, k] + u * B[i, g, k]
                h[i, d, k] = after
                total += C[i, g, k] * after
            y[i, d] = total + D[d] * x[i, d] if D.size > 0 else total


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor,
    state_indices: Tensor | None,
    softplus: bool,
) -> Tensor:
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h)
    skip = empty(0, dtype=dtype) if D is None else D
    bias = filled(A.shape[:1], dtype) if dt_bias is None else dt_bias
    parameters = [view(t.detach().to(dtype).contiguous()) for t in (A, skip, bias)]

    def token(x, dt, B, C, z, h):
        y = empty(*x.shape, dtype=dtype)
        tokens = [read(t, dtype) for t in (x, dt, B, C, h, y)]
        run(_token, split_step(x.shape[0], x.shape[1], LEAST), *tokens, *parameters, softplus)
        if z is not None:
            y *= F.silu(z.to(dtype))
        return y.to(x.dtype), h

    return advance(token, (x, dt, B, C, z), h, state_indices, x.dim() == 3, dtype)
