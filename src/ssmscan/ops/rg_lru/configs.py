"""The launch configurations of rg_lru's kernels, measured on an H200."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # channels of a program
    bands: int  # of 16 steps in a tile: 2 or 4
    warps: int  # BD · bands / 32, so that a thread holds a channel of a band
    stages: int  # tiles in flight


# By the bytes of an element of x.
FORWARD = {2: Config(32, 4, 4, 3), 4: Config(32, 4, 4, 2)}
BACKWARD = {2: Config(32, 2, 2, 2), 4: Config(32, 2, 2, 2)}
