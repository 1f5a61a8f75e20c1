"""The launch configurations of linear_scan's kernels, measured on an H200."""

from typing import NamedTuple

from ssmscan.ops._triton.walk import WARPS


class Config(NamedTuple):
    BD: int  # channels of a program: 32 · warps, so that a thread holds one
    warps: int
    stages: int  # tiles in flight


# By the bytes of an element of x and the number of inputs: with fewer inputs more tiles must be in flight.
FORWARD = {
    (2, 2): Config(64, 2, 5),
    (2, 3): Config(32, 1, 5),
    (2, 4): Config(64, 2, 4),
    (4, 2): Config(64, 2, 4),
    (4, 3): Config(64, 2, 3),
    (4, 4): Config(64, 2, 3),
}
# Where narrow programs would be more than WARPS: then rows of 64 bytes from so many places cost 1.4 times the time.
CROWDED = {2: Config(128, 4, 4), 4: Config(64, 2, 3)}
# By the bytes of an element of x.
BACKWARD = {2: Config(128, 4, 4), 4: Config(64, 2, 3)}


def forward_config(itemsize: int, inputs: int, batch: int, d: int) -> Config:
    config = FORWARD[itemsize, inputs]
    return config if batch * -(-d // config.BD) * config.warps <= WARPS else CROWDED[itemsize]
