"""Both modes in plain PyTorch, differentiable any number of times, on any device.

What the inputs drive is computed from a zero state: by FFT, or in chunks of 64 steps that are matrix products for all
chunks at once, with a scan over the chunks' states. What the initial state leaves behind is added to it. At most
n/64 times the input's size is stored, never (b, l, d, n).
"""

import torch
from torch import Tensor

from ssmscan.ops.s4d.system import (
    CHUNK,
    chunks,
    complexes,
    enters,
    leaves,
    powers,
    reals,
    taps,
    toeplitz,
    weight,
)

# Chunks whose states are passed on one after the other, in all groups of so many at once.
GROUP = 8


def s4d(
    x: Tensor, z: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    if batch == 0 or l == 0:
        return x * 1, x.new_zeros(batch, *C.shape, dtype=C.dtype) if h0 is None else h0.to(C.dtype) * 1
    # Autocast would round the matrix products to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        E = powers(z, C.dtype)
        X = chunks(x, C.real.dtype)
        m = X.shape[2]
        drive = (X.flatten(1, 2) @ reals(enters(E, B))).unflatten(1, (batch, m))
        drive = complexes(drive, C.dtype)
        W = reals(leaves(E, z, C).conj()).mT
        if mode == "conv":
            y = _convolve(x.permute(2, 0, 1).to(X.dtype), _kernel(z, E, B, C, D, l))
            h = (drive * _decay(z, m, C.dtype).flip(1)[:, None]).sum(2)
        else:
            entering = _entering(drive, z * CHUNK)
            y = torch.baddbmm(X.flatten(1, 2) @ toeplitz(taps(E, B, C, D)), reals(entering).flatten(1, 2), W)
            y = y.view(d, batch, m * CHUNK)[:, :, -l:]
            h = (z * CHUNK).exp().to(C.dtype)[:, None] * entering[:, :, -1] + drive[:, :, -1]
        if h0 is not None:
            h0 = h0.to(C.dtype).transpose(0, 1)
            starts = h0[:, :, None] * _decay(z, m, C.dtype)[:, None]
            y = y + (reals(starts).flatten(1, 2) @ W).view(d, batch, m * CHUNK)[:, :, :l]
            h = h + (z * l).exp().to(C.dtype)[:, None] * h0
        return y.permute(1, 2, 0).to(x.dtype).contiguous(), h.transpose(0, 1).contiguous()


def _decay(z: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Ā^0, Ā^64, Ā^128, …, (d, count, n)."""
    steps = CHUNK * torch.arange(count, device=z.device)
    return (z[:, None] * steps[:, None]).exp().to(dtype)


def _entering(drive: Tensor, z: Tensor) -> Tensor:
    """The state that enters each chunk, (d, b, m, n), where ``drive`` is what each adds and exp(z) what each keeps."""
    d, batch, m, n = drive.shape
    groups = (m + GROUP - 1) // GROUP
    drive = torch.cat([drive, drive.new_zeros(d, batch, groups * GROUP - m, n)], 2).unflatten(2, (groups, GROUP))
    keep = z.exp().to(drive.dtype)[:, None, None]
    h = torch.zeros_like(drive[:, :, :, 0])
    states = []
    for i in range(GROUP):
        states.append(h)
        h = keep * h + drive[:, :, :, i]
    entering = torch.stack(states, 3)
    if groups > 1:
        steps = torch.arange(GROUP, device=z.device)
        kept = (z[:, None] * steps[:, None]).exp().to(drive.dtype)
        entering = entering + kept[:, None, None] * _entering(h, z * GROUP)[:, :, :, None]
    return entering.flatten(2, 3)[:, :, :m]


def _kernel(z: Tensor, E: Tensor, B: Tensor, C: Tensor, D: Tensor | None, l: int) -> Tensor:
    """The response to an impulse for l steps, (d, l): one product of Vandermonde matrices."""
    starts = _decay(z, (l + CHUNK - 1) // CHUNK, C.dtype) * (weight(C) * B * C)[:, None]
    K = (reals(starts.conj()) @ reals(E).mT).flatten(1)[:, :l]
    if D is None:
        return K
    return torch.cat([K[:, :1] + D.to(K.dtype)[:, None], K[:, 1:]], 1)


def _convolve(x: Tensor, K: Tensor) -> Tensor:
    """The causal convolution of (d, b, l) with (d, l)."""
    l = x.shape[-1]
    # Long enough that nothing wraps around.
    size = 2 * l if torch.compiler.is_compiling() else _fast_size(2 * l - 1)
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(K, size)[:, None], size)[:, :, :l]


def _fast_size(least: int) -> int:
    """The smallest 2^i, 3·2^i or 5·2^i that is ``least`` or more: a prime length takes several times as long."""
    return min(odd << max(-(-least // odd) - 1, 0).bit_length() for odd in (1, 3, 5))
