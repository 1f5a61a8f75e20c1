"""The launch configurations of matrix_scan's kernels, measured on an H200."""

from typing import NamedTuple


class Config(NamedTuple):
    BD: int  # columns of a program, all of one row: one or two for each thread
    warps: int
    stages: int  # tiles in flight


_NARROW = Config(32, 1, 4)
# By the bytes of an element of x.
_WIDE = {2: Config(64, 1, 4), 4: Config(64, 1, 3)}


def config(itemsize: int, columns: int, packed: bool) -> Config:
    """With their states, two columns of packed sequences do not fit into the registers of a thread."""
    return _NARROW if columns <= 32 or packed else _WIDE[itemsize]
