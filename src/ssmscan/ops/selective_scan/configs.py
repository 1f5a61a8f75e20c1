"""The launch configurations of selective_scan's kernels."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # channels of a program
    warps: int
    stages: int  # tiles in flight
    programs: int  # that fill the device
    held: int  # steps whose states the backward holds in registers


# A program of more states than 16 divides them among its warps.
STATES = 16
FORWARD = Config(BD=32, warps=1, stages=3, programs=1056, held=8)
BACKWARD = Config(BD=128, warps=4, stages=3, programs=264, held=4)
BACKWARD_MANY_STATES = Config(BD=32, warps=1, stages=2, programs=528, held=4)
