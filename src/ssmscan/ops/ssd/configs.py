"""The tiles and launch configurations of ssd's kernels, for an H200."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.backend import INTERPRET
from ssmscan.ops._triton.launch import padded

# Programs of four warps that keep a Hopper GPU busy: two for each multiprocessor.
PROGRAMS = 264
# A segment of fewer chunks is not worth its summary.
SHORTEST = 4


class Tiles(NamedTuple):
    """The shapes that all kernels of a call share."""

    dtype: torch.dtype  # of the states between chunks, and of the operands of matrix products
    DOT: Any  # the same for Triton
    precise: bool  # float32, to all its digits
    Q: int  # tokens of a chunk
    BP: int  # channels of a head that a program takes at once
    BN: int  # states, padded


class Config(NamedTuple):
    warps: int
    stages: int  # chunks (in the walk) or heads (in the gradients) in flight


# By whether the products are precise, and whether y is written.
_WALK = {
    (False, True): Config(4, 2),
    (False, False): Config(4, 3),
    (True, True): Config(4, 1),
    (True, False): Config(4, 1),
}
# By whether the products are precise, and whether there are more than 128 states, of which two stages do not fit: what
# comes from the states, and what from pairs of tokens.
_GRADIENTS = {
    (False, False): (Config(8, 3), Config(4, 3)),
    (False, True): (Config(8, 1), Config(4, 1)),
    (True, False): (Config(8, 1), Config(8, 1)),
    (True, True): (Config(8, 1), Config(8, 1)),
}
DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def walk_config(tiles: Tiles, writes: bool) -> Config:
    return _narrow(tiles, _WALK[tiles.precise, writes])


def state_gradient_config(tiles: Tiles) -> Config:
    return _narrow(tiles, _GRADIENTS[tiles.precise, tiles.BN > 128][0])


def pair_gradient_config(tiles: Tiles, scans: int) -> Config:
    config = _narrow(tiles, _GRADIENTS[tiles.precise, tiles.BN > 128][1])
    # With what two scans need there is room for two programs.
    return config if scans == 1 else config._replace(stages=min(config.stages, 2))


def _narrow(tiles: Tiles, config: Config) -> Config:
    """Eight warps share the columns of a product in halves; Triton 3.6 reads past the operand if those are 8 wide."""
    return config if min(tiles.BP, tiles.BN) >= 32 else config._replace(warps=4)


def tiles_for(x: Tensor, n: int, backward: bool) -> Tiles:
    """The state's tile stays in registers; each product in float32 takes three, of operands in two parts."""
    exact = x.dtype.itemsize == 4
    BN = max(padded(n), 16)
    BP = _channels(x.shape[3], min((4096 if exact else 8192) // BN, 32 if exact else 64))
    if INTERPRET:
        # The interpreter cannot multiply in bfloat16; with short chunks small cases have several.
        return Tiles(torch.float32, tl.float32, exact, 16, BP, BN)
    return Tiles(x.dtype, DOTS[x.dtype], exact, 32 if exact and not backward else 64, BP, BN)


def gradient_tiles(tiles: Tiles, p: int) -> Tiles:
    """Without a state to carry in registers there is room for more channels of float32."""
    return tiles._replace(BP=_channels(p, 64)) if tiles.precise and tiles.BN <= 128 else tiles


def _channels(p: int, most: int) -> int:
    return max(min(padded(p), most), 16)


def segments_for(programs: int, chunks: int) -> tuple[int, int]:
    """The chunks of a segment, and how many segments fill the device."""
    wanted = min(max(PROGRAMS // programs, 1), max(chunks // SHORTEST, 1))
    length = max(-(-chunks // wanted), 1)
    return length, max(-(-chunks // length), 1)


def split_heads(programs: int, heads: int) -> tuple[int, int]:
    """Of a group's heads, how many one program takes, and into how many parts that splits them."""
    splits = min(max(PROGRAMS // 2 // max(programs, 1), 1), heads)
    at_once = -(-heads // splits)
    return at_once, -(-heads // at_once)
