"""The decode step in Numba: a state is read and written once, by a thread for some heads of one batch row."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, read, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run
from ssmscan.ops.decoding import advance
from ssmscan.ops.ssd.cpu_kernels import step_size
from ssmscan.shapes import state_dtype

# Elements of the states that are worth a thread.
LEAST = 1 << 16


# Sums may be taken in vectors; the order is still the same every time.
@compiled(fastmath={"reassoc", "contract"})
def _token(x, dt, B, C, h, y, A, D, bias, softplus, low, high, i, first, end):
    per_group = A.shape[0] // B.shape[1]
    for head in range(first, end):
        delta, _ = step_size(dt[i, head] + bias[head], softplus, low, high)
        decay = np.exp(delta * A[head])
        Br, Cr = B[i, head // per_group], C[i, head // per_group]
        for r in range(x.shape[2]):
            hr, u = h[i, head, r], delta * x[i, head, r]
            total = u * 0
            for k in range(hr.shape[0]):
                hr[k] = decay * hr[k] + u * Br[k]
                total += hr[k] * Cr[k]
            y[i, head, r] = total + D[head, r] * x[i, head, r] if D.size > 0 else total


def ssd_step(
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
    low: float,
    high: float,
) -> Tensor:
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h)
    heads, p = x.shape[-2:]
    skip = empty(0, 0, dtype=dtype) if D is None else D.view(heads, -1).expand(heads, p)
    bias = filled((heads,), dtype) if dt_bias is None else dt_bias
    parameters = [view(t.detach().to(dtype).contiguous()) for t in (A, skip, bias)]

    def token(x, dt, B, C, z, h):
        y = empty(*x.shape, dtype=dtype)
        # One part of the work for each LEAST elements, in whole heads.
        count = max(-(-LEAST // max(h[0, 0].numel(), 1)), 1) if h.numel() else 1
        parts = [(i, j, min(j + count, heads)) for i in range(x.shape[0]) for j in range(0, heads, count)]
        tokens = [read(t, dtype) for t in (x, dt, B, C, h, y)]
        run(_token, parts, *tokens, *parameters, softplus, low, high)
        if z is not None:
            y *= F.silu(z.to(dtype))
        return y.to(x.dtype), h

    return advance(token, (x, dt, B, C, z), h, state_indices, x.dim() == 4, dtype)
