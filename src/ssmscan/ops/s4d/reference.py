"""The recurrence as a plain loop over time. In float64 it is the oracle of every other backend."""

import torch
from torch import Tensor


def s4d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``dtype`` is the state's, complex when A is."""
    a, b = discretise(dt, A, B, dtype)
    l = x.shape[1]
    h = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if h0 is None else h0.to(dtype)
    # One state for the whole batch, or one for each packed sequence.
    states = [h] if sequence is None else list(h.split(1))
    owner = [0] * l if sequence is None else sequence.tolist()
    xs, ys = x.unbind(1), [x] * l
    for t in reversed(range(l)) if reverse else range(l):
        states[owner[t]], ys[t] = advance(xs[t], a, b, C, D, states[owner[t]])
    return torch.stack(ys, 1) if ys else x * 1, torch.cat(states) if states else h * 1


def discretise(dt: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(dt·A), and (exp(dt·A) - 1)/A · B by its power series where dt·A is small."""
    A = A.to(dtype)
    step = dt.to(A.real.dtype)[:, None]
    z = step * A
    small = z.abs() < 0.5
    series, term = torch.ones_like(z), torch.ones_like(z)
    for k in range(2, 20):
        term = term * torch.where(small, z, 0) / k
        series = series + term
    gain = torch.where(small, step * series, (z.exp() - 1) / torch.where(small, 1, A))
    return z.exp(), gain * B.to(dtype)


def advance(x: Tensor, a: Tensor, b: Tensor, C: Tensor, D: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
    """The state after one token, and the token's output; x is (b, d)."""
    u = x.to(h.real.dtype)
    h = a * h + b * u[:, :, None]
    y = (C.to(h.dtype) * h).sum(-1)
    if y.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + D.to(y.dtype) * u
    return h, y.to(x.dtype)
