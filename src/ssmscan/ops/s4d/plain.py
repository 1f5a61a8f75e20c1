"""Both modes in plain PyTorch, differentiable any number of times, on any device.

In chunks of 64 steps the scan is matrix products for all chunks at once, and a recurrence over the chunks' states. By
FFT what the inputs drive is computed from a zero state, and what the initial state leaves behind is added to it. At
most n/64 times the input's size is stored, never (b, l, d, n). Packed sequences always go by chunks: their lengths are
not known on the host, and an FFT would mix them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.recurrence import carry, scaled_exp
from ssmscan.ops.s4d.layout import Layout, packed, remainder
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


def s4d(
    x: Tensor,
    z: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    mode: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    s = x.shape[0] if h0 is None else h0.shape[0]
    h = C.new_zeros(s, *C.shape) if h0 is None else h0.to(C.dtype)
    if 0 in x.shape[:2]:
        return x * 1, h * 1
    layout = None if sequence is None else packed(sequence, s, reverse)
    flipped = reverse and layout is None
    u = (x.flip(1) if flipped else x).to(C.real.dtype)
    # Autocast would round the matrix products to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        if mode == "conv" and layout is None:
            y, h = _by_fft(u, z, B, C, D, None if h0 is None else h)
        else:
            y, h = _by_chunks(u, z, B, C, D, h, layout)
    return (y.flip(1) if flipped else y).to(x.dtype).contiguous(), h.contiguous()


def _by_chunks(
    x: Tensor, z: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    if layout is None:
        X = F.pad(x.permute(2, 0, 1), (0, -l % CHUNK)).unflatten(2, ((l + CHUNK - 1) // CHUNK, CHUNK))
        first = owner = None
    else:
        X = layout.lay(x, in_front=False).unflatten(2, (layout.rows, CHUNK))
        first, owner = layout.owners()
    m = X.shape[2]
    E = powers(z, C.dtype)
    V, W = enters(E, B), reals(leaves(E, z, C).conj()).mT
    drive = complexes(X.flatten(1, 2) @ reals(V), C.dtype).unflatten(1, (batch, m)).permute(1, 2, 0, 3)
    decay, exponent = (v[None, None].expand(1, m, -1, -1) for v in scaled_exp(z * CHUNK))
    entering, _ = carry(decay.to(C.dtype), exponent.to(x.dtype), drive, h, first, owner)
    outputs = torch.baddbmm(
        X.flatten(1, 2) @ toeplitz(taps(E, B, C, D)), reals(entering.permute(2, 0, 1, 3).flatten(1, 2)), W
    )
    y = outputs.view(d, batch, m * CHUNK)
    # The last chunk is not full, and its zeros are not to pass over the state.
    if layout is None:
        r = l - (m - 1) * CHUNK
        tail = X[:, :, -1, :r] @ reals(V[:, CHUNK - r :])
        final = (z * r).exp().to(C.dtype) * entering[:, -1] + complexes(tail, C.dtype).transpose(0, 1)
        return y[:, :, :l].permute(1, 2, 0), final
    kept, last = remainder(layout.length), layout.begin + (layout.chunks - 1).clamp(min=0)
    column = torch.arange(CHUNK, device=x.device) + (kept - CHUNK)[:, None]
    tail = X[:, 0, last].gather(2, column.clamp(min=0).expand(d, -1, -1))
    tail = complexes(torch.where(column >= 0, tail, 0) @ reals(V), C.dtype).transpose(0, 1)
    final = (z * kept[:, None, None]).exp().to(C.dtype) * entering[0, last] + tail
    return layout.gather(y, in_front=False), torch.where((layout.chunks == 0)[:, None, None], h, final)


def _by_fft(x: Tensor, z: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, l, d = x.shape
    E = powers(z, C.dtype)
    X = chunks(x)
    m = X.shape[2]
    drive = complexes((X.flatten(1, 2) @ reals(enters(E, B))).unflatten(1, (batch, m)), C.dtype)
    decay = _decay(z, m, C.dtype)
    y = _convolve(x.permute(2, 0, 1), _kernel(E, decay, B, C, D, l))
    h = (drive * decay.flip(1)[:, None]).sum(2)
    if h0 is not None:
        h0 = h0.transpose(0, 1)
        left = reals(h0[:, :, None] * decay[:, None]).flatten(1, 2) @ reals(leaves(E, z, C).conj()).mT
        y = y + left.view(d, batch, m * CHUNK)[:, :, :l]
        h = h + (z * l).exp().to(C.dtype)[:, None] * h0
    return y.permute(1, 2, 0), h.transpose(0, 1)


def _decay(z: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Ā^0, Ā^64, Ā^128, …, (d, count, n)."""
    steps = CHUNK * torch.arange(count, device=z.device)
    return (z[:, None] * steps[:, None]).exp().to(dtype)


def _kernel(E: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, l: int) -> Tensor:
    """The response to an impulse for l steps, (d, l): one product of Vandermonde matrices."""
    starts = decay * (weight(C) * B * C)[:, None]
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
