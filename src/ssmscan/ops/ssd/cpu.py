"""The scan and its gradients on the CPU: what stands around the Numba kernels."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmscan.ops._numba.parallel import empty, run
from ssmscan.ops.ssd import cpu_kernels
from ssmscan.shapes import state_dtype

# Parts of a group's heads, each of which sums its own dB and dC: for as many threads, and the same for any number.
PARTS = 8
# Heads of a part, that share what is the same for a group.
FEWEST = 2


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    final = _filled(_shape(x, B, h0), dtype, h0)
    y = empty(*x.shape, dtype=dtype)
    inputs = _inputs(x, dt, A, B, C, D, dt_bias, softplus, low, high, dtype)
    chunks = _chunks(inputs[1], sequence, reverse)
    _, parts = _parts(x, B)
    run(cpu_kernels.forward, parts, *inputs, chunks, final.numpy(), y.numpy(), _per_group(x, B), reverse)
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype), final


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    reverse: bool,
    initial: bool,
) -> tuple[Tensor, ...]:
    batch, l, heads, p = x.shape
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    wide = x.to(dtype)
    dy = dy.to(dtype)
    dz = x.new_empty(0)
    if z is not None:
        y, _ = forward(wide, dt, A, B, C, D, None, dt_bias, h0, sequence, softplus, low, high, reverse)
        dy, dz = ungate(dy, y, z)
    start, g = (_filled(_shape(x, B, h0), dtype, h) for h in (h0, dh))
    splits, parts = _parts(x, B)
    dx, dsteps = empty(batch, l, heads, p, dtype=dtype), empty(2, batch, l, heads, dtype=dtype)
    dBs, dCs = empty(2, splits, *B.shape, dtype=dtype)
    dDs = _filled((batch, heads, p), dtype)
    inputs = _inputs(wide, dt, A, B, C, D, dt_bias, softplus, low, high, dtype)
    chunks = _chunks(inputs[1], sequence, reverse)
    outputs = (v.numpy() for v in (g, dx, dsteps, dBs, dCs, dDs))
    run(
        cpu_kernels.backward, parts, *inputs, dy.contiguous().numpy(), chunks, start.numpy(), *outputs,
        _per_group(x, B), reverse,
    )  # fmt: skip
    ddt = empty(*dt.shape, dtype=dtype)
    stretches = _stretches(dt)
    dAs, dbiases = (_filled((len(stretches), heads), dtype) for _ in range(2))
    run(
        cpu_kernels.step_gradients, stretches, *(v.numpy() for v in (ddt, dAs, dbiases, dsteps)),
        *_rates(dt, A, dt_bias, dtype), softplus, low, high,
    )  # fmt: skip
    dA = dAs.sum(0).to(A.dtype)
    dD = dDs.new_empty(0) if D is None else dDs.sum(0 if D.dim() == 2 else (0, 2)).to(D.dtype)
    dbias = dbiases.new_empty(0) if dt_bias is None else dbiases.sum(0).to(dt_bias.dtype)
    dB, dC = _total(dBs).to(B.dtype), _total(dCs).to(C.dtype)
    dh0 = g if initial else g.new_empty(0)
    return dx.to(x.dtype), ddt.to(dt.dtype), dA, dB, dC, dD, dz, dbias, dh0


def ungate(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y·silu(z) by y and by z; the memory of ``y`` is taken for the latter."""
    gate, gated = z.detach().to(y.dtype), empty(*y.shape, dtype=y.dtype)
    torch.ops.aten.silu_backward(y.mul_(dy), gate, grad_input=y)
    torch.ops.aten.silu(gate, out=gated).mul_(dy)
    return gated, y.to(z.dtype)


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> list[np.ndarray]:
    """What both kernels read: x, the steps (sizes and decays), B, C and D, (h, p), or (0, 0) where there is none."""
    steps = empty(2, *dt.shape, dtype=dtype)
    rates = _rates(dt, A, dt_bias, dtype)
    run(cpu_kernels.steps, _stretches(dt), steps.numpy(), *rates, softplus, low, high)
    skip = x.new_empty(0, 0) if D is None else D.view(x.shape[2], -1).expand(*x.shape[2:])
    return _arrays(dtype, x, steps, B, C, skip)


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    return [v.detach().to(dtype).contiguous().numpy() for v in tensors]


def _rates(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dtype: torch.dtype) -> list[np.ndarray]:
    """What the steps are made of."""
    return _arrays(dtype, dt, A, A.new_zeros(A.shape) if dt_bias is None else dt_bias)


def _stretches(dt: Tensor) -> list[tuple[int, int, int]]:
    """A number, the batch row and the first token of stretches of tokens."""
    rows = [(i, begin) for i in range(dt.shape[0]) for begin in range(0, dt.shape[1], cpu_kernels.STRETCH)]
    return [(number, *row) for number, row in enumerate(rows)]


def _shape(x: Tensor, B: Tensor, h0: Tensor | None) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:], B.shape[3]) if h0 is None else tuple(h0.shape)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
    """A copy of the values, or zeros. By NumPy: where PyTorch's threads have worked they spin when ours begin."""
    out = empty(*shape, dtype=dtype)
    out.numpy()[...] = 0 if values is None else values.detach().to(dtype).numpy()
    return out


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
