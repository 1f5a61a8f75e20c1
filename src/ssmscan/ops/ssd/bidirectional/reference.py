"""Both scans as plain loops over time, and their sum token by token. In float64 the oracle of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.ssd.bidirectional.autograd import Inputs, Options
from ssmscan.ops.ssd.bidirectional.directions import directions
from ssmscan.ops.ssd.reference import ssd
from ssmscan.shapes import state_dtype


def ssd_bidirectional(inputs: Inputs, options: Options) -> Tensor:
    x, D, z, sequence, shift = inputs.x, inputs.D, inputs.z, inputs.sequence, options.shift
    l, heads = x.shape[1:3]
    wide = x.to(state_dtype(*inputs[:11]))
    forth, back = (scan._replace(x=wide, D=None) for scan in directions(inputs))
    forward, backward = (
        ssd(*scan, *options[:3], reverse)[0].unbind(1) for scan, reverse in ((forth, False), (back, True))
    )
    owner = [0] * l if sequence is None else sequence.tolist()
    ys = []
    for t, x_t in enumerate(wide.unbind(1)):
        y = x_t * (0 if D is None else D.to(wide.dtype).view(heads, -1))
        if not shift:
            y = y + forward[t] + backward[t]
        else:
            if t > 0 and owner[t - 1] == owner[t]:
                y = y + forward[t - 1]
            if t + 1 < l and owner[t + 1] == owner[t]:
                y = y + backward[t + 1]
        ys.append(y)
    if not ys:
        return x * 1
    y = torch.stack(ys, 1)
    return (y if z is None else y * F.silu(z.to(wide.dtype))).to(x.dtype)
