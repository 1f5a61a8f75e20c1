"""The launch configurations of s4d's kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssmscan.ops._triton import device


class Config(NamedTuple):
    warps: int
    stages: int  # tiles in flight
    rows: int  # of a tile; 16 are the fewest that a tensor core takes
    # Tensor cores read float32 as TF32, with half the bits, or all of them in three products.
    precision: str


class Walk(NamedTuple):
    shared: int  # bytes of shared memory that it takes
    states: int  # in its registers; more of them take several walks
    config: Config


# By x's dtype. TF32 keeps 3 bits more than bfloat16, so its rounding does not show.
_NARROW = Config(4, 3, 16, "tf32")
_WIDE = Config(8, 2, 16, "tf32x3")
# 16 complex states spill registers; with more warps or stages they take twice the time.
_FEW = Config(4, 1, 16, "tf32x3")
# By whether x is bfloat16 and whether the states are complex: of these the first that the device has the memory for.
_WALKS = {
    (True, False): [Walk(73_728, 64, _NARROW)],
    (True, True): [Walk(114_688, 64, _NARROW), Walk(71_680, 32, _NARROW)],
    (False, False): [Walk(118_784, 64, _WIDE), Walk(79_872, 32, _WIDE)],
    (False, True): [Walk(188_416, 64, _WIDE), Walk(114_688, 32, _WIDE), Walk(69_632, 16, _FEW)],
}
GRAM = {
    torch.bfloat16: Config(8, 2, 32, "tf32"),
    torch.float16: Config(8, 2, 16, "tf32x3"),
    torch.float32: Config(8, 2, 16, "tf32x3"),
}


def walk_for(x: Tensor, dtype: torch.dtype) -> Walk:
    """The walk over x, of states of ``dtype``."""
    walks = _WALKS[x.dtype is torch.bfloat16, dtype.is_complex]
    return device.first_fitting("s4d", walks, device.shared_memory(x.device))
