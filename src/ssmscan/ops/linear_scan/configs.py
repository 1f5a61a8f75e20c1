"""The launch configurations of linear_scan's kernels, measured on an H200."""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    BD: int  # channels of a program: 32 · warps, so that a thread holds one
    warps: int
    stages: int  # tiles in flight


FORWARD = {
    torch.bfloat16: Config(128, 4, 4),
    torch.float16: Config(128, 4, 4),
    torch.float32: Config(128, 4, 3),
}
BACKWARD = {
    torch.bfloat16: Config(128, 4, 3),
    torch.float16: Config(128, 4, 3),
    torch.float32: Config(128, 4, 2),
}
