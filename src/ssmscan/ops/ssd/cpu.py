"""The scan and its gradients on the CPU: what stands around the Numba kernels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmscan.ops._numba.arrays import empty, filled, view
from ssmscan.ops._numba.parallel import run
from ssmscan.ops.ssd import cpu_kernels
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

# Parts of a group's heads, each of which sums its own dB and dC: for as many threads, and the same for any number.
PARTS = 8
# Heads of a part, that share what is the same for a group.
FEWEST = 2


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    reverse = options.reverse
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    final = filled(_shape(x, B, h0), dtype, h0)
    y = empty(*x.shape, dtype=dtype)
    arrays = _arrays_of(inputs, options, dtype)
    chunks = _chunks(arrays[1], sequence, reverse)
    _, parts = _parts(x, B)
    run(cpu_kernels.forward, parts, *arrays, chunks, final.numpy(), y.numpy(), _per_group(x, B), reverse)
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype), final


def backward(
    inputs: Inputs, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, low, high, reverse = options
    batch, l, heads, p = x.shape
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    wide = x.to(dtype)
    dy = dy.to(dtype)
    dz = None
    if z is not None:
        y, _ = forward(inputs._replace(x=wide, z=None), options)
        dy, dz = ungate(dy, y, z)
    start, g = (filled(_shape(x, B, h0), dtype, h) for h in (h0, dh))
    splits, parts = _parts(x, B)
    dx, dsteps = empty(batch, l, heads, p, dtype=dtype), empty(2, batch, l, heads, dtype=dtype)
    dBs, dCs = empty(2, splits, *B.shape, dtype=dtype)
    dDs = filled((batch, heads, p), dtype)
    arrays = _arrays_of(inputs, options, dtype)
    chunks = _chunks(arrays[1], sequence, reverse)
    outputs = (v.numpy() for v in (g, dx, dsteps, dBs, dCs, dDs))
    run(
        cpu_kernels.backward, parts, *arrays, dy.contiguous().numpy(), chunks, start.numpy(), *outputs,
        _per_group(x, B), reverse,
    )  # fmt: skip
    ddt = empty(*dt.shape, dtype=dtype)
    stretches = _stretches(dt)
    dAs, dbiases = (filled((len(stretches), heads), dtype) for _ in range(2))
    run(
        cpu_kernels.step_gradients, stretches, *(v.numpy() for v in (ddt, dAs, dbiases, dsteps)),
        *_rates(dt, A, dt_bias, dtype), softplus, low, high,
    )  # fmt: skip
    dA = dAs.sum(0).to(A.dtype)
    dD = None if D is None else dDs.sum(0 if D.dim() == 2 else (0, 2)).to(D.dtype)
    dbias = None if dt_bias is None else dbiases.sum(0).to(dt_bias.dtype)
    dB, dC = _total(dBs).to(B.dtype), _total(dCs).to(C.dtype)
    return [dx.to(x.dtype), ddt.to(dt.dtype), dA, dB, dC, dD, dz, dbias, g]


def ungate(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y·silu(z) by y and by z; the memory of ``y`` is taken for the latter."""
    gate, gated = z.detach().to(y.dtype), empty(*y.shape, dtype=y.dtype)
    torch.ops.aten.silu_backward(y.mul_(dy), gate, grad_input=y)
    torch.ops.aten.silu(gate, out=gated).mul_(dy)
    return gated, y.to(z.dtype)


def _arrays_of(inputs: Inputs, options: Options, dtype: torch.dtype) -> list[np.ndarray]:
    """What both kernels read: x, the steps (sizes and decays), B, C and D, (h, p), or (0, 0) where there is none."""
    x, dt, A, B, C, D, _, dt_bias, *_ = inputs
    softplus, low, high, _ = options
    steps = empty(2, *dt.shape, dtype=dtype)
    rates = _rates(dt, A, dt_bias, dtype)
    run(cpu_kernels.steps, _stretches(dt), steps.numpy(), *rates, softplus, low, high)
    skip = empty(0, 0, dtype=dtype) if D is None else D.view(x.shape[2], -1).expand(*x.shape[2:])
    return _arrays(dtype, x, steps, B, C, skip)


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    return [view(v.detach().to(dtype).contiguous()) for v in tensors]


def _rates(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dtype: torch.dtype) -> list[np.ndarray]:
    """What the steps are made of."""
    return _arrays(dtype, dt, A, filled(A.shape, dtype) if dt_bias is None else dt_bias)


def _stretches(dt: Tensor) -> list[tuple[int, int, int]]:
    """A number, the batch row and the first token of stretches of tokens."""
    rows = [(i, begin) for i in range(dt.shape[0]) for begin in range(0, dt.shape[1], cpu_kernels.STRETCH)]
    return [(number, *row) for number, row in enumerate(rows)]


def _shape(x: Tensor, B: Tensor, h0: Tensor | None) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:], B.shape[3]) if h0 is None else tuple(h0.shape)


def _chunks(steps: np.ndarray, sequence: Tensor | None, reverse: bool) -> np.ndarray:
    """The chunks of all heads, (chunks, 3)."""
    owner = np.zeros(steps.shape[2], np.int32) if sequence is None else sequence.numpy()
    return cpu_kernels.cut(steps[1], owner, reverse)


def _parts(x: Tensor, B: Tensor) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Into how many parts a group's heads are split, and of each its number, batch row, first head and end."""
    per_group = _per_group(x, B)
    size = max(-(-per_group // PARTS), FEWEST)
    splits = -(-per_group // size)
    return splits, [
        (split, i, first + split * size, min(first + (split + 1) * size, first + per_group))
        for i in range(x.shape[0])
        for first in range(0, x.shape[2], max(per_group, 1))
        for split in range(splits)
    ]


def _per_group(x: Tensor, B: Tensor) -> int:
    return x.shape[2] // B.shape[2]


def _total(parts: Tensor) -> Tensor:
    """The sum along the first axis. PyTorch's threads would still be spinning when a kernel starts on ours."""
    out = empty(*parts.shape[1:], dtype=parts.dtype)
    begins = [(begin,) for begin in range(0, out.numel(), cpu_kernels.SUMS)]
    run(cpu_kernels.total, begins, parts.flatten(1).numpy(), out.flatten().numpy())
    return out
