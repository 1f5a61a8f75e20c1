"""The launch configurations of causal_conv1d's kernels."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # channels of a program
    warps: int
    rows: int  # of a tile
    stages: int  # tiles in flight
    registers: int | None  # of a thread at most
    programs: int  # wanted


class Step(NamedTuple):
    BD: int
    warps: int


# By the bytes of an element of x.
FORWARD = {2: Config(128, 1, 16, 3, None, 2112), 4: Config(128, 1, 16, 2, None, 2112)}
# By the bytes of an element of x, and whether the width is above 4.
BACKWARD = {
    (2, False): Config(128, 1, 4, 4, 128, 2112),
    (2, True): Config(64, 1, 8, 3, None, 1056),
    (4, False): Config(64, 1, 8, 3, 128, 2112),
    (4, True): Config(64, 1, 8, 3, None, 1056),
}
STEP = Step(128, 4)
