"""The launch configurations of selective_scan's kernels."""

from typing import NamedTuple

from ssmscan.ops._triton.launch import padded

# A program of the forward of more states than 16 divides them among its warps.
STATES = 16


class Config(NamedTuple):
    BD: int  # channels of a program
    warps: int  # for 16 states
    stages: int  # tiles in flight
    programs: int  # into which segments divide the walkers
    divided: int  # walkers, at most, whose sequence is cut into segments


class BackwardConfig(NamedTuple):
    states: int  # of a tile, a power of two
    BD: int  # channels of a program
    repeats: int  # of them in one lane
    warps: int
    resident: int  # programs that fill the device: more of them take parts of the batch in turn
    programs: int  # into which segments divide the walkers
    divided: int  # walkers, at most, whose sequence is cut into segments
    kept: int  # rows of warps whose sums of dB and dC are added at the end of a run; 1 adds them in every tile
    registers: int | None = None  # of a lane, at most

    @property
    def channels(self) -> int:
        """Those side by side in a warp, four states in each lane."""
        return max(128 // self.states, 1)


# Two segments cost as much as one.
FORWARD = Config(BD=32, warps=1, stages=3, programs=2112, divided=704)


def forward_tile(n: int) -> tuple[int, int]:
    """The states of a tile for n, a power of two, and the warps of a program."""
    N = max(STATES, padded(n))
    return N, FORWARD.warps * (N // STATES)


def backward_config(n: int) -> BackwardConfig:
    """For n states; a lane holds four of each of ``repeats`` channels."""
    if n <= 16:
        # Beyond one walker for each multiprocessor of an H200 a whole walk is as fast as one of segments.
        return BackwardConfig(states=16, BD=64, repeats=2, warps=4, resident=264, programs=528, divided=132, kept=4)
    states = padded(n)
    repeats = 2 if states < 256 else 4
    warps = states // (4 * repeats)
    return BackwardConfig(states, 32, repeats, warps, resident=264, programs=264, divided=88, kept=1)
