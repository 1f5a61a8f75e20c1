"""The tiles and launch configurations of ssd's kernels, for an H200."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.backend import INTERPRET
from ssmscan.ops._triton import device
from ssmscan.ops._triton.launch import padded
from ssmscan.shapes import error

# Programs of four warps that keep a Hopper GPU busy: two for each multiprocessor.
PROGRAMS = 264
# A segment of fewer chunks is not worth its summary.
SHORTEST = 4


class Config(NamedTuple):
    warps: int
    stages: int  # chunks (in the walk) or heads (in the gradients) in flight


class Choice(NamedTuple):
    """How a forward or backward cuts its tensors into tiles."""

    shared: int  # bytes of shared memory that its largest program takes
    Q: int  # tokens of a chunk
    # Of the gradients: the elements of a state that a program takes at once, and how the kernel of what comes from the
    # states and the one of pairs of tokens are launched.
    elements: int = 0
    of_states: Config = Config(8, 1)
    of_pairs: Config = Config(8, 1)


class Tiles(NamedTuple):
    """The shapes that all kernels of a call share."""

    dtype: torch.dtype  # of the states between chunks, and of the operands of matrix products
    DOT: Any  # the same for Triton
    precise: bool  # float32, to all its digits
    Q: int  # tokens of a chunk
    BP: int  # channels of a head that a program takes at once
    BN: int  # states, padded
    choice: Choice


# By whether the products are precise, and whether y is written.
_WALK = {
    (False, True): Config(4, 2),
    (False, False): Config(4, 3),
    (True, True): Config(4, 1),
    (True, False): Config(4, 1),
}
# Of these the first that the device has the memory for, by whether the products are precise and by the most states.
# What is taken is the most on an A100 and on consumer GPUs, that with the shift of ssd_bidirectional. Where matrix
# products read their operands from shared memory, as on an H100 and a B200, it is up to half as much again, and there
# is room. Tiles of eight columns for each of the warps that share a product are not for bfloat16: Triton 3.6 reads past
# them.
_FORWARD = {
    False: {256: [Choice(87_044, 64)], 512: [Choice(156_676, 64)]},
    True: {512: [Choice(65_536, 32)], 1024: [Choice(131_072, 32)]},
}
_BACKWARD = {
    False: {
        64: [
            Choice(109_064, 64, 8192, Config(8, 3), Config(4, 3)),
            Choice(75_264, 64, 8192, Config(8, 2), Config(4, 2)),
        ],
        128: [
            Choice(158_216, 64, 8192, Config(8, 3), Config(4, 3)),
            Choice(99_588, 64, 8192, Config(8, 2), Config(4, 2)),
        ],
        256: [
            Choice(114_688, 64, 8192, Config(8, 1), Config(4, 1)),
            Choice(81_920, 32, 8192, Config(4, 1), Config(4, 1)),
        ],
        512: [Choice(180_224, 64, 8192, Config(8, 1), Config(4, 1))],
    },
    # Large tiles are for Hopper's matrix instructions: elsewhere they spill 14 KB a thread, small ones less than 1.
    True: {
        128: [Choice(196_608, 64, 8192), Choice(81_920, 32, 2048, Config(4, 1), Config(4, 1))],
        256: [Choice(196_608, 64, 4096), Choice(98_304, 32, 4096)],
    },
}
DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def walk_config(tiles: Tiles, writes: bool) -> Config:
    return _narrow(tiles, _WALK[tiles.precise, writes])


def state_gradient_config(tiles: Tiles) -> Config:
    return _narrow(tiles, tiles.choice.of_states)


def pair_gradient_config(tiles: Tiles, scans: int) -> Config:
    config = _narrow(tiles, tiles.choice.of_pairs)
    # With what two scans need there is room for two programs.
    return config if scans == 1 else config._replace(stages=min(config.stages, 2))


def _narrow(tiles: Tiles, config: Config) -> Config:
    """Eight warps share the columns of a product in halves; Triton 3.6 reads past the operand if those are 8 wide."""
    return config if min(tiles.BP, tiles.BN) >= 32 else config._replace(warps=4)


def tiles_for(x: Tensor, n: int, backward: bool) -> Tiles:
    return _tiles(x.dtype, x.shape[3], n, backward, device.shared_memory(x.device))


@cache
def _tiles(dtype: torch.dtype, p: int, n: int, backward: bool, shared: int) -> Tiles:
    """The state's tile stays in registers; each product in float32 takes three, of operands in two parts."""
    exact = dtype.itemsize == 4
    BN = max(padded(n), 16)
    table = (_BACKWARD if backward else _FORWARD)[exact]
    choices = next((choices for most, choices in table.items() if most >= BN), None)
    if choices is None:
        rule = f"B must have at most {max(table)} states n of {dtype} on a GPU"
        raise NotImplementedError(error("ssd", rule, n, 'Use backend="torch".'))
    choice = device.first_fitting("ssd", choices, shared)
    BP = _channels(p, min((4096 if exact else 8192) // BN, 32 if exact else 64))
    if INTERPRET:
        # The interpreter cannot multiply in bfloat16; with short chunks small cases have several.
        return Tiles(torch.float32, tl.float32, exact, 16, BP, BN, choice)
    return Tiles(dtype, DOTS[dtype], exact, choice.Q, BP, BN, choice)


def gradient_tiles(tiles: Tiles, p: int) -> Tiles:
    """Without a state to carry in registers there is room for more channels of float32."""
    return tiles._replace(BP=_channels(p, min(tiles.choice.elements // tiles.BN, 64)))


def _channels(p: int, most: int) -> int:
    return max(min(padded(p), most), 16)


def segments_for(programs: int, chunks: int) -> int:
    """How many segments fill the device, of so many ``chunks`` shared out that none is empty."""
    wanted = min(max(PROGRAMS // programs, 1), max(chunks // SHORTEST, 1))
    length = max(-(-chunks // wanted), 1)
    return max(-(-chunks // length), 1)


def split_heads(programs: int, heads: int) -> tuple[int, int]:
    """Of a group's heads, how many one program takes, and into how many parts that splits them."""
    splits = min(max(PROGRAMS // 2 // max(programs, 1), 1), heads)
    at_once = -(-heads // splits)
    return at_once, -(-heads // at_once)
