"""The convolution in plain PyTorch, differentiable any number of times, on any device: one product for each tap.

The state is put before the sequence (reversed: behind it, turned around), so that no tap needs a condition. Of packed
sequences each has its own w - 1 rows there; the outputs that straddle two sequences are computed and left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.causal_conv1d.autograd import Inputs, Options
from ssmscan.shapes import state_dtype


def causal_conv1d(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, weight, bias, h0, sequence, bounds = inputs
    silu, reverse = options
    batch, l, d = x.shape
    w = weight.shape[1]
    dtype = state_dtype(x, weight, bias, h0)
    s = batch if bounds is None else bounds.shape[0] - 1
    h = x.new_zeros(s, w - 1, d, dtype=dtype) if h0 is None else h0.to(dtype)
    if l == 0:
        return x * 1, h * 1
    taps = weight.to(dtype).t()
    if reverse:
        taps, h = taps.flip(0), h.flip(1)
    wide = x.to(dtype)
    if sequence is None or bounds is None:
        extended = torch.cat([wide, h] if reverse else [h, wide], 1)
        final = extended[:, : w - 1] if reverse else extended[:, l:]
    else:
        shift = torch.arange(s, device=x.device) * (w - 1)
        rows = torch.arange(w - 1, device=x.device)
        first, last = ((side + shift)[:, None] + rows for side in (bounds[:-1], bounds[1:]))
        # The output of a token stands where the earliest of its inputs does.
        outputs = torch.arange(l, device=x.device) + sequence * (w - 1)
        extended = torch.cat([wide[0], h.flatten(0, 1)])
        source = outputs.new_empty(l + s * (w - 1))
        source[outputs if reverse else outputs + w - 1] = torch.arange(l, device=x.device)
        source[(last if reverse else first).flatten()] = torch.arange(s * (w - 1), device=x.device) + l
        extended = extended[source][None]
        final = extended[0, first if reverse else last]
    n = extended.shape[1] - (w - 1)
    z = extended[:, :n] * taps[0]
    for k in range(1, w):
        z = torch.addcmul(z, extended[:, k : k + n], taps[k])
    if sequence is not None:
        z = z[:, outputs]
    if bias is not None:
        z = z + bias.to(dtype)
    final = final.flip(1) if reverse else final * 1
    return (F.silu(z) if silu else z).to(x.dtype), final
