"""What the two kernels of ssd's gradients, of states and of pairs of tokens, are both launched with."""

from typing import Any, NamedTuple

from torch import Tensor

from ssmscan.ops._triton.window import from_first
from ssmscan.ops.ssd.configs import Tiles
from ssmscan.ops.ssd.step_sizes import Steps, token_strides


class Chunks(NamedTuple):
    """The chunks of a call and their tensors, each from its first token in scan order on."""

    x: Tensor
    dy: Tensor
    B: Tensor
    C: Tensor
    totals: tuple[Tensor, Tensor]  # dB and dC of each split of a group's heads, (splits, b, l, g, n)
    table: Tensor | None
    steps: Steps
    tiles: Tiles
    reverse: bool
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    constants: tuple[Any, ...]


def chunks_of(
    x: Tensor,
    dy: Tensor,
    B: Tensor,
    C: Tensor,
    dx: Tensor,
    totals: Tensor,
    table: Tensor | None,
    steps: Steps,
    tiles: Tiles,
    reverse: bool,
    heads_at_once: int,
    shift: bool,
) -> Chunks:
    """Of dB and dC there are ``totals``, (splits, 2, b, l, g, n). What is written to has the layout of ``dx``.

    ``shift``: y was that of the token before, as in the walk.
    """
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    delta, _, sums = steps
    scans, chunks = delta.shape[0], delta.shape[3]
    x, dy, B, C, dx = (from_first(t, 1, reverse) for t in (x, dy, B, C, dx))
    dB, dC = (from_first(t, 2, reverse) for t in totals.unbind(1))
    *read, written = (token_strides(t, reverse) for t in (x, dy, B, C, dx))
    strides = (*(s for t in read for s in t[::2]), dB.stride(0))
    out_time = -dB.stride(2) if reverse else dB.stride(2)
    times = (*(t[1] for t in read), out_time, written[1])
    far = tiles.Q * max(abs(t[1]) for t in (*read, written)) >= 1 << 31
    sizes = (l, heads, p, chunks, sums.stride(1), delta.stride(0), sums.stride(0))
    constants = (
        *times, scans, heads // groups, heads_at_once, shift, table is None and l % tiles.Q == 0, far, tiles.precise,
        tiles.DOT, tiles.Q, n, tiles.BP, tiles.BN, -(-p // tiles.BP), p % tiles.BP == 0, n == tiles.BN,
    )  # fmt: skip
    grid = (batch * chunks, groups * dB.shape[0], 1)
    return Chunks(x, dy, B, C, (dB, dC), table, steps, tiles, reverse, grid, sizes, strides, constants)
