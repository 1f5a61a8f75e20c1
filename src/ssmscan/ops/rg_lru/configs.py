"""The launch configurations of rg_lru's kernels, measured on an H200."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # channels of a program: 32 · warps, so that a thread holds one; half as many with two bands
    warps: int
    stages: int  # tiles in flight


# By the bytes of an element of x. The forward's tiles have two bands.
FORWARD = {2: Config(64, 4, 4), 4: Config(64, 4, 3)}
BACKWARD = {2: Config(64, 2, 4), 4: Config(64, 2, 2)}
