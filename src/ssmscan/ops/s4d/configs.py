"""The launch configurations of s4d's kernels."""

from typing import NamedTuple

import torch

# States in a walk's registers; more of them take several walks.
STATES = 64


class Config(NamedTuple):
    warps: int
    stages: int  # tiles in flight
    rows: int  # of a tile; 16 are the fewest that a tensor core takes
    # Tensor cores read float32 as TF32, with half the bits, or all of them in three products.
    precision: str


# By x's dtype. TF32 keeps 3 bits more than bfloat16, so its rounding does not show.
WALK = {
    torch.bfloat16: Config(4, 3, 16, "tf32"),
    torch.float16: Config(8, 2, 16, "tf32x3"),
    torch.float32: Config(8, 2, 16, "tf32x3"),
}
GRAM = {
    torch.bfloat16: Config(8, 2, 32, "tf32"),
    torch.float16: Config(8, 2, 16, "tf32x3"),
    torch.float32: Config(8, 2, 16, "tf32x3"),
}
