"""Numba kernels: one thread walks the sequences of one batch row, one or those packed there, for a few channels.

Each inner loop runs along the channels, so that the compiler vectorises it: states and parameters lie in (n, d). They
come as real and imaginary parts; of a real system the latter are empty. With c = w C (w = 2 for complex states, whose
conjugates are left out, else 1)

    h_t = a h_{t-1} + b x_t,    y_t = Re(c h_t) + D x_t.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssmscan.ops._numba.arrays import empty, filled, row, rows, view
from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops._numba.parallel import run, split
from ssmscan.ops.s4d.autograd import Inputs, Options
from ssmscan.ops.s4d.system import weight

# Steps whose states the backward recomputes at once.
SPAN = 32
# Channels of a part: its states and parameters stay in the processor's inner caches.
WIDEST = 64


@compiled
def _part(array, first, end):
    """The channels of (m, n, d), contiguous."""
    return np.ascontiguousarray(array[:, :, first:end])


@compiled(inline="always")
def _advance(a, b, h, x, width):
    """One step of the states h, (parts, n, width)."""
    for k in range(a.shape[1]):
        if a.shape[0] == 1:
            for j in range(width):
                h[0, k, j] = a[0, k, j] * h[0, k, j] + b[0, k, j] * x[j]
        else:
            for j in range(width):
                real, imaginary = h[0, k, j], h[1, k, j]
                h[0, k, j] = a[0, k, j] * real - a[1, k, j] * imaginary + b[0, k, j] * x[j]
                h[1, k, j] = a[0, k, j] * imaginary + a[1, k, j] * real + b[1, k, j] * x[j]


@compiled(inline="always")
def _retreat(a, b, c, before, after, gs, xr, dyr, dxr, sums, width):
    """One step back of the states' gradients gs; it adds to dx and to the sums, of a, b and c."""
    for k in range(a.shape[1]):
        if a.shape[0] == 1:
            for j in range(width):
                gs[0, k, j] += c[0, k, j] * dyr[j]
                sums[0, 0, k, j] += gs[0, k, j] * before[0, k, j]
                sums[1, 0, k, j] += gs[0, k, j] * xr[j]
                sums[2, 0, k, j] += after[0, k, j] * dyr[j]
            for j in range(width):
                dxr[j] += b[0, k, j] * gs[0, k, j]
            for j in range(width):
                gs[0, k, j] *= a[0, k, j]
        else:
            for j in range(width):
                gs[0, k, j] += c[0, k, j] * dyr[j]
                gs[1, k, j] -= c[1, k, j] * dyr[j]
            for j in range(width):
                sums[0, 0, k, j] += gs[0, k, j] * before[0, k, j] + gs[1, k, j] * before[1, k, j]
                sums[0, 1, k, j] += gs[1, k, j] * before[0, k, j] - gs[0, k, j] * before[1, k, j]
            for j in range(width):
                sums[1, 0, k, j] += gs[0, k, j] * xr[j]
                sums[1, 1, k, j] += gs[1, k, j] * xr[j]
            for j in range(width):
                sums[2, 0, k, j] += after[0, k, j] * dyr[j]
                sums[2, 1, k, j] -= after[1, k, j] * dyr[j]
            for j in range(width):
                dxr[j] += b[0, k, j] * gs[0, k, j] + b[1, k, j] * gs[1, k, j]
            for j in range(width):
                real, imaginary = gs[0, k, j], gs[1, k, j]
                gs[0, k, j] = a[0, k, j] * real + a[1, k, j] * imaginary
                gs[1, k, j] = a[0, k, j] * imaginary - a[1, k, j] * real


@compiled
def _forward(x, strides, a, b, c, skip, h, y, bounds, reverse, i, first, end):
    width = end - first
    a, b, c = _part(a, first, end), _part(b, first, end), _part(c, first, end)
    for number in range(bounds.size - 1):
        begin, stop = bounds[number], bounds[number + 1]
        s = _part(h[i + number], first, end)
        for position in range(begin, stop):
            t = begin + stop - 1 - position if reverse else position
            xr = row(x, strides[0], i, t, first, end)
            yr = y[i, t, first:end]
            _advance(a, b, s, xr, width)
            for j in range(width):
                yr[j] = skip[first + j] * xr[j]
            for k in range(a.shape[1]):
                if a.shape[0] == 1:
                    for j in range(width):
                        yr[j] += c[0, k, j] * s[0, k, j]
                else:
                    for j in range(width):
                        yr[j] += c[0, k, j] * s[0, k, j] - c[1, k, j] * s[1, k, j]
        h[i + number, :, :, first:end] = s


@compiled
def _backward(
    x, dy, strides, a, b, c, skip, h0, g, dx, da, db, dc, dskip, bounds, reverse, i, first, end
):  # fmt: skip
    """``g`` comes in as the gradient of the final states and leaves as that of the initial ones."""
    width = end - first
    a, b, c = _part(a, first, end), _part(b, first, end), _part(c, first, end)
    parts, n = a.shape[:2]
    longest = 0
    for number in range(bounds.size - 1):
        longest = max(longest, bounds[number + 1] - bounds[number])
    starts = np.empty(((longest + SPAN - 1) // SPAN, parts, n, width), a.dtype)
    states = np.empty((SPAN + 1, parts, n, width), a.dtype)
    total = np.zeros((3, parts, n, width), a.dtype)
    for number in range(bounds.size - 1):
        begin, stop = bounds[number], bounds[number + 1]
        s, gs = _part(h0[i + number], first, end), _part(g[i + number], first, end)
        spans = (stop - begin + SPAN - 1) // SPAN
        for span in range(spans):
            starts[span] = s
            for position in range(begin + span * SPAN, min(begin + (span + 1) * SPAN, stop)):
                t = begin + stop - 1 - position if reverse else position
                _advance(a, b, s, row(x, strides[0], i, t, first, end), width)
        for span in range(spans - 1, -1, -1):
            low = begin + span * SPAN
            high = min(low + SPAN, stop)
            states[0] = starts[span]
            for position in range(low, high):
                t = begin + stop - 1 - position if reverse else position
                after = states[position - low + 1]
                after[:] = states[position - low]
                _advance(a, b, after, row(x, strides[0], i, t, first, end), width)
            # Summed by span first, which loses less of many small terms.
            sums = np.zeros((3, parts, n, width), a.dtype)
            for position in range(high - 1, low - 1, -1):
                t = begin + stop - 1 - position if reverse else position
                xr, dyr = row(x, strides[0], i, t, first, end), row(dy, strides[1], i, t, first, end)
                dxr, dskipr = dx[i, t, first:end], dskip[i, first:end]
                for j in range(width):
                    dxr[j] = skip[first + j] * dyr[j]
                    dskipr[j] += xr[j] * dyr[j]
                before, after = states[position - low], states[position - low + 1]
                _retreat(a, b, c, before, after, gs, xr, dyr, dxr, sums, width)
            total += sums
        g[i + number, :, :, first:end] = gs
    da[i, :, :, first:end] = total[0]
    db[i, :, :, first:end] = total[1]
    dc[i, :, :, first:end] = total[2]


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, z, B, C, D, h0, sequence = inputs
    b, l, d = x.shape
    parameters, skip = _parameters(z, B, C, D)
    h = _initial(h0, b, C)
    y = empty(b, l, d, dtype=h.dtype)
    arrays, strides = rows((x,), x.shape, h.dtype)
    run(
        _forward, split(b, d, WIDEST), *arrays, strides, *parameters, view(skip), h.numpy(), y.numpy(),
        _bounds(sequence, h, l), options.reverse,
    )  # fmt: skip
    return y.to(x.dtype), _joined(h)


def backward(
    inputs: Inputs, dy: Tensor, dh: Tensor | None, options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, z, B, C, D, h0, sequence = inputs
    b, l, d = x.shape
    parameters, skip = _parameters(z, B, C, D)
    s = b if h0 is None else h0.shape[0]
    start, g = _initial(h0, s, C), _initial(dh, s, C)
    dx = empty(b, l, d, dtype=g.dtype)
    sums = [empty(b, *g.shape[1:], dtype=g.dtype) for _ in range(3)]
    dskip = filled((b, d), g.dtype)
    arrays, strides = rows((x, dy), x.shape, g.dtype)
    run(
        _backward, split(b, d, WIDEST), *arrays, strides, *parameters, view(skip), start.numpy(), g.numpy(),
        dx.numpy(), *(t.numpy() for t in sums), dskip.numpy(), _bounds(sequence, g, l), options.reverse,
    )  # fmt: skip
    da, dB, dC = (_joined(t.sum(0, keepdim=True))[0] for t in sums)
    dz = da * z.exp().conj()
    dD = dskip.sum(0) if D is not None else dskip.new_empty(0)
    return dx.to(x.dtype), dz, dB, weight(C) * dC, dD, _joined(g) if h0 is not None else C.new_empty(0, *C.shape)


def _bounds(sequence: Tensor | None, h: Tensor, l: int) -> np.ndarray:
    """The bounds of the sequences that share a batch row: of the packed ones, as many as there are states h, or one."""
    if sequence is None:
        return np.array([0, l])
    return np.searchsorted(sequence.numpy(), np.arange(h.shape[0] + 1))


def _parameters(z: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[list[np.ndarray], Tensor]:
    """a, b and c as (parts, n, d), and D."""
    parameters = [_split(t.to(C.dtype)).numpy() for t in (z.exp(), B, weight(C) * C)]
    return parameters, C.real.new_zeros(C.shape[0]) if D is None else D.contiguous()


def _initial(h: Tensor | None, b: int, C: Tensor) -> Tensor:
    """A state (b, d, n) as (b, parts, n, d), in new memory."""
    if h is None:
        return filled((b, 1 + C.is_complex(), *reversed(C.shape)), C.real.dtype)
    return _split(h).clone(memory_format=torch.contiguous_format)


def _split(t: Tensor) -> Tensor:
    """(..., d, n) as (..., parts, n, d): the real and, of a complex tensor, the imaginary part."""
    t = t.detach().resolve_conj()
    t = torch.view_as_real(t) if t.is_complex() else t[..., None]
    return t.transpose(-3, -1).contiguous()


def _joined(t: Tensor) -> Tensor:
    """The inverse of :func:`_split`."""
    t = t.transpose(-3, -1)
    if t.shape[-1] == 1:
        return t[..., 0].contiguous()
    # Not contiguous(), which leaves the strides of a tensor without elements as they are.
    return torch.view_as_complex(t.clone(memory_format=torch.contiguous_format))
