"""The forward of ssd on Triton: the step sizes, and one walk."""

from typing import overload

import torch
from torch import Tensor

from ssmscan.ops._triton.compose import Enter
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.cuts import cut
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.ops.ssd.configs import Tiles, tiles_for
from ssmscan.ops.ssd.kernel_walk import summarise, walk
from ssmscan.ops.ssd.step_sizes import steps


def forward(inputs: Inputs, options: Options, *, enter: Enter | None = None) -> tuple[Tensor, Tensor]:
    """y and the final state. Of a stretch of a longer sequence ``enter`` makes h0, from what the stretch does to it."""
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, low, high, reverse = options
    batch, l, heads, p = x.shape
    n = B.shape[3]
    y = x.new_empty(batch, l, heads, p)
    # The kernel writes the final states of sequences with tokens; those of the others keep their initial ones.
    if sequence is None and l > 0:
        final = x.new_empty(batch, heads, p, n, dtype=torch.float32)
    elif h0 is None:
        final = x.new_zeros(batch, heads, p, n, dtype=torch.float32)
    else:
        final = x.new_empty(h0.shape, dtype=torch.float32).copy_(h0)
    if y.numel() == 0:
        return y, final
    tiles = tiles_for(x, n, backward=False)
    x, B, C = (channels_last(v) for v in (x, B, C))
    chunks = table(sequence, final, tiles, reverse)
    sizes = steps([(dt, reverse)], float32(A), float32(dt_bias), [chunks], tiles, (softplus, low, high))
    summaries = None
    if enter is not None:
        summaries = summarise(x, B, sizes, tiles, reverse)
        h0 = enter(summaries.stretches())()
    z = channels_last(z)
    walk(x, B, sizes, h0, chunks, tiles, reverse, summaries=summaries, c=C, D=D, z=z, y=y, final=final)
    return y, final


@overload
def float32(parameter: Tensor) -> Tensor: ...
@overload
def float32(parameter: Tensor | None) -> Tensor | None: ...
def float32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def table(sequence: Tensor | None, states: Tensor, tiles: Tiles, reverse: bool) -> Tensor | None:
    """The chunks of packed sequences, (5, chunks), as the kernels read them: the fields of Cuts, one after the other.

    Of a chunk ``table + i * chunks + chunk`` is begin (i = 0), length (1), sequence (2), first (3) or last (4).
    """
    if sequence is None:
        return None
    return torch.stack([v.int() for v in cut(sequence, states.shape[0], tiles.Q, reverse)])
