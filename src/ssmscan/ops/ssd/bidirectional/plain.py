"""Both scans by matrix products within chunks, in plain PyTorch; differentiable any number of times, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.packing import first_tokens
from ssmscan.ops.ssd.autograd import Options as ScanOptions
from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.bidirectional.directions import directions
from ssmscan.ops.ssd.plain import ssd
from ssmscan.shapes import state_dtype


def ssd_bidirectional(inputs: Inputs, options: Options) -> Tensor:
    x, D, z, sequence = inputs.x, inputs.D, inputs.z, inputs.sequence
    wide = x.to(state_dtype(*inputs[:11]))
    forth, back = (scan._replace(x=wide) for scan in directions(inputs))
    bounds = options[:3]
    forward, _ = ssd(forth._replace(D=None) if options.shift else forth, ScanOptions(*bounds, False))
    backward, _ = ssd(back, ScanOptions(*bounds, True))
    if options.shift:
        y = after(forward, sequence, False) + after(backward, sequence, True)
        y = y if D is None else y + D.to(wide.dtype).view(x.shape[2], -1) * wide
    else:
        y = forward + backward
    return (y if z is None else y * F.silu(z.to(wide.dtype))).to(x.dtype)


def after(v: Tensor, sequence: Tensor | None, reverse: bool) -> Tensor:
    """At each token what v, (b, l, ...), has at the token before it in scan order; 0 at a sequence's first."""
    v = torch.cat([v[:, 1:], v[:, :1]] if reverse else [v[:, -1:], v[:, :-1]], 1)
    token = torch.arange(v.shape[1], device=v.device)
    if sequence is not None:
        first = first_tokens(sequence, reverse)
    else:
        first = token == (v.shape[1] - 1 if reverse else 0)
    return v.masked_fill(first.view(-1, *(1,) * (v.dim() - 2)), 0)
