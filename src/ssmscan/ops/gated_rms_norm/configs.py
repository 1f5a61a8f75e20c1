"""The launch configurations of gated_rms_norm's kernels."""

from typing import NamedTuple

# Bytes of shared memory for the tiles in flight of one program: beyond that it loads them one at a time.
SHARED = 98304


class Config(NamedTuple):
    elements: int  # of a tile, of whole rows: at least one
    per_thread: int
    stages: int  # tiles in flight
    programs: int


class Tiling(NamedTuple):
    """How a launch covers n rows of some groups."""

    groups: int
    rows: int  # of a tile
    walkers: int  # programs for each group
    warps: int
    stages: int


# By the bytes of an element of x.
FORWARD = {2: Config(4096, 32, 1, 4224), 4: Config(4096, 16, 2, 528)}
BACKWARD = {2: Config(4096, 16, 4, 264), 4: Config(4096, 16, 2, 264)}


def tiling(config: Config, n: int, groups: int, padded: int, row_bytes: int) -> Tiling:
    """``padded`` is the size of a group, rounded up to a power of two; ``row_bytes`` that of all inputs."""
    rows = max(config.elements // padded, 1)
    warps = min(max(rows * padded // (32 * config.per_thread), 1), 32)
    stages = max(min(config.stages, SHARED // (rows * row_bytes)), 1)
    walkers = min(max(config.programs // groups, 1), -(-n // rows))
    return Tiling(groups, rows, walkers, warps, stages)
