"""Numba kernels: one thread goes over a range of rows, group by group, each row read once from memory.

The gate and its derivative are PyTorch's, whose exponential is vectorised. A sum over channels may be reassociated, so
that it is vectorised too; the order is the same for every row.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, read, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run
from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

# Rows of a part. The sum of the parts does not depend on the number of threads.
PART = 256


@compiled(fastmath={"reassoc", "contract"})
def _dot(a, b):
    total = a.dtype.type(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@compiled
def _forward(x, gate, weight, y, eps, size, after, begin, end):
    u = np.empty(size, y.dtype)
    for i in range(begin, end):
        for first in range(0, x.shape[1], size):
            xr, wr, yr = x[i, first : first + size], weight[first : first + size], y[i, first : first + size]
            u[:] = xr
            if gate.size > 0 and not after:
                gr = gate[i, first : first + size]
                for j in range(size):
                    u[j] *= gr[j]
            inverse = 1 / np.sqrt(_dot(u, u) / u.dtype.type(size) + u.dtype.type(eps))
            for j in range(size):
                yr[j] = u[j] * inverse * wr[j]
            if gate.size > 0 and after:
                gr = gate[i, first : first + size]
                for j in range(size):
                    yr[j] *= gr[j]


@compiled
def _backward(x, gate, weight, dy, dx, dgate, total, eps, size, after, part, begin, end):
    u, a, n = np.empty(size, dx.dtype), np.empty(size, dx.dtype), np.empty(size, dx.dtype)
    gated = gate.size > 0
    for i in range(begin, end):
        for first in range(0, x.shape[1], size):
            xr, wr, dyr = x[i, first : first + size], weight[first : first + size], dy[i, first : first + size]
            gr = gate[i, first : first + size] if gated else xr
            dxr, tr = dx[i, first : first + size], total[part, first : first + size]
            u[:] = xr
            a[:] = dyr
            if gated:
                changed = a if after else u
                for j in range(size):
                    changed[j] *= gr[j]
            inverse = 1 / np.sqrt(_dot(u, u) / u.dtype.type(size) + u.dtype.type(eps))
            for j in range(size):
                n[j] = u[j] * inverse
            for j in range(size):
                tr[j] += a[j] * n[j]
            for j in range(size):
                a[j] *= wr[j]
            mean = _dot(a, n) / u.dtype.type(size)
            for j in range(size):
                dxr[j] = inverse * (a[j] - n[j] * mean)
            if gated:
                dgr = dgate[i, first : first + size]
                if after:
                    for j in range(size):
                        dgr[j] = dyr[j] * n[j] * wr[j]
                else:
                    for j in range(size):
                        dgr[j] = dxr[j] * xr[j]
                    for j in range(size):
                        dxr[j] *= gr[j]


def forward(inputs: Inputs, options: Options) -> Tensor:
    x, weight, z = inputs
    eps, size, norm_before_gate, _ = options
    dtype = state_dtype(x, weight, z)
    y = empty(*x.shape, dtype=dtype)
    if y.numel() > 0:
        rows = y.numpy().reshape(-1, x.shape[-1])
        parts = [part[1:] for part in _parts(rows.shape[0])]
        scale = view(weight.to(dtype).contiguous())
        run(_forward, parts, _rows(x, dtype), _gate(z, x.shape[-1], dtype), scale, rows, eps, size, norm_before_gate)
    return y.to(options.dtype)


def backward(inputs: Inputs, dy: Tensor, options: Options, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    x, weight, z = inputs
    eps, size, norm_before_gate, _ = options
    dtype = state_dtype(x, weight, z)
    d = x.shape[-1]
    n = x.numel() // max(d, 1)
    parts = _parts(n)
    dx = empty(*x.shape, dtype=dtype)
    dgate = empty(*(x.shape if z is not None else (0, d)), dtype=dtype)
    total = filled((len(parts), d), dtype)
    if x.numel() > 0:
        run(
            _backward,
            parts,
            _rows(x, dtype),
            _gate(z, d, dtype),
            view(weight.to(dtype).contiguous()),
            _rows(dy, dtype),
            dx.view(n, d).numpy(),
            dgate.view(-1, d).numpy(),
            total.numpy(),
            eps,
            size,
            norm_before_gate,
        )
    dweight = weight.new_empty(weight.shape if needs[1] else (0,))
    if needs[1]:
        dweight.copy_(total.sum(0))
    dz = x.new_empty(0) if z is None else z.new_empty(0)
    if z is not None and needs[2]:
        dz = torch.ops.aten.silu_backward.grad_input(dgate, z.to(dtype), grad_input=dgate).to(z.dtype)
    return dx.to(x.dtype) if needs[0] else x.new_empty(0), dweight, dz


def _parts(n: int) -> list[tuple[int, int, int]]:
    """Numbered ranges of rows."""
    return [(number, start, min(start + PART, n)) for number, start in enumerate(range(0, n, PART))]


def _rows(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return read(tensor.contiguous(), dtype).reshape(-1, tensor.shape[-1])


def _gate(z: Tensor | None, d: int, dtype: torch.dtype) -> np.ndarray:
    """silu(z) in rows of d channels; without z no rows."""
    return empty(0, d, dtype=dtype).numpy() if z is None else _rows(F.silu(z.to(dtype)), dtype)
