"""The launch configurations of matrix_scan's kernels, measured on an H200."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # columns of a program, all of one row: one or two for each thread
    warps: int
    stages: int  # tiles in flight


# By the bytes of an element of x, whether a row has more than 32 columns, and whether sequences are packed: with their
# states, two columns do not fit into the registers of a thread.
FORWARD = {
    (2, False, False): Config(32, 1, 8),
    (2, False, True): Config(32, 1, 6),
    (2, True, False): Config(64, 1, 6),
    (2, True, True): Config(64, 2, 6),
    (4, False, False): Config(32, 1, 6),
    (4, False, True): Config(32, 1, 4),
    (4, True, False): Config(64, 1, 4),
    (4, True, True): Config(64, 2, 4),
}
BACKWARD = {
    (2, False, False): Config(32, 1, 6),
    (2, False, True): Config(32, 1, 4),
    (2, True, False): Config(64, 1, 4),
    (2, True, True): Config(64, 2, 4),
    (4, False, False): Config(32, 1, 4),
    (4, False, True): Config(32, 1, 3),
    (4, True, False): Config(64, 2, 3),
    (4, True, True): Config(64, 2, 3),
}
