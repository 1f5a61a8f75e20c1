"""The discretised system and what it does in 64 steps at once: small tensors that every fast path builds on.

With Ā = exp(z), z = dt·A, and one step h ← Ā h + B̄ x, y = Re(w C h) (w = 2 for a complex A, else 1), 64 steps are

    h ← Ā^64 h + Σ_j V_j x_j,    y_i = Re(W_i h) + Σ_{j≤i} k_{i-j} x_j,
    V_j = Ā^(63-j) B̄,    W_i = w C Ā^(i+1),    k_t = Re(w C Ā^t B̄) + D·[t = 0].

z is kept in float64, where it costs nothing: a power's error is its exponent times that of z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps that are one matrix product. Longer chunks need fewer states between them and more products inside.
CHUNK = 64


def discretise(dt: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log Ā and B̄ of the zero-order hold; ``dtype`` is the state's."""
    # Apple's devices have no float64.
    real, complex_ = (torch.float32, torch.complex64) if dt.device.type == "mps" else (torch.float64, torch.complex128)
    step, A = dt.to(real)[:, None], A.to(complex_ if A.is_complex() else real)
    z = step * A
    # (exp(z) - 1)/A is exp(z/2)·sinh(z/2)/(A/2). Where z is small, sinh by its series: it holds at A = 0 too, and
    # neither it nor its derivative cancels. Not expm1 elsewhere, whose derivative in PyTorch loses a small exp(z).
    small = z.abs() < 0.5
    s = torch.where(small, z / 2, 0)
    u = s * s
    series = 1 + u / 6 * (1 + u / 20 * (1 + u / 42 * (1 + u / 72 * (1 + u / 110))))
    gain = torch.where(small, step * s.exp() * series, (z.exp() - 1) / torch.where(small, 1, A))
    return z, gain.to(dtype) * B.to(dtype)


def powers(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Ā^0 … Ā^63, (d, 64, n)."""
    steps = torch.arange(8, device=z.device)[:, None]
    ones, eights = ((z[:, None] * count).exp().to(dtype) for count in (steps, 8 * steps))
    return (eights[:, :, None] * ones[:, None]).flatten(1, 2)


def enters(E: Tensor, B: Tensor) -> Tensor:
    """V, (d, 64, n), of the powers E: what each input leaves in the state after the chunk."""
    return E.flip(1) * B[:, None]


def leaves(E: Tensor, z: Tensor, C: Tensor) -> Tensor:
    """W, (d, 64, n): what a state gives each output of the chunk that it enters."""
    return E * (weight(C) * C * z.exp().to(C.dtype))[:, None]


def taps(E: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """k, (d, 64): the response to an impulse."""
    k = (reals(E) @ reals((weight(C) * B * C).conj())[:, :, None])[:, :, 0]
    if D is None:
        return k
    return k + F.pad(D.to(k.dtype)[:, None], (0, CHUNK - 1))


def toeplitz(k: Tensor) -> Tensor:
    """(d, 64, 64): what input j, the second axis, gives output i, the last."""
    return F.pad(k, (CHUNK - 1, 0)).unfold(1, CHUNK, 1).flip(1)


def weight(C: Tensor) -> int:
    """Of each complex state a conjugate is left out."""
    return 2 if C.is_complex() else 1


def reals(t: Tensor) -> Tensor:
    """(..., n) complex as (..., 2n) real; a real tensor as it is."""
    return torch.view_as_real(t.resolve_conj()).flatten(-2) if t.is_complex() else t


def complexes(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`reals`, if ``dtype`` is complex."""
    return torch.view_as_complex(t.unflatten(-1, (-1, 2))) if dtype.is_complex else t


def chunks(x: Tensor) -> Tensor:
    """x (b, l, d) as (d, b, m, 64), with zeros before the first token to fill the first chunk."""
    b, l, d = x.shape
    x = F.pad(x.permute(2, 0, 1), (-l % CHUNK, 0))
    return x.reshape(d, b, (l + CHUNK - 1) // CHUNK, CHUNK)
