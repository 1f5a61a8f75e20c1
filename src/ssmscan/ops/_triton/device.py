"""What a GPU gives a program of a kernel, by which launch configurations are chosen.

Matrix products keep their tiles in shared memory, and a launch that asks for more of it than the device has fails. Of
the configurations for one size a table lists the fastest on a Hopper GPU first, and each that follows takes less.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from triton.compiler.compiler import max_shared_mem  # in triton.compiler only from 3.7 on

from ssmscan.shapes import error


class Architecture(NamedTuple):
    shared: int  # bytes of shared memory that a program may have
    registers: int  # of 32 bits, of a program; a thread has at most 255


# By compute capability, ten times: those that every launch configuration is compiled for in the tests. A launch asks
# the device itself.
ARCHITECTURES = {
    80: Architecture(163 << 10, 1 << 16),  # A100
    86: Architecture(99 << 10, 1 << 16),  # RTX 30, A10, A40
    89: Architecture(99 << 10, 1 << 16),  # RTX 40, L4, L40
    90: Architecture(227 << 10, 1 << 16),  # H100, H200
    100: Architecture(227 << 10, 1 << 16),  # B200
    120: Architecture(99 << 10, 1 << 16),  # RTX 50
}


class Choice(Protocol):
    @property
    def shared(self) -> int:
        """Bytes of shared memory that the largest program takes."""


AnyChoice = TypeVar("AnyChoice", bound=Choice)


def shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that a program may have; a CPU, which interprets, is taken for a Hopper GPU."""
    # Triton's own number, by which it refuses a launch; asked for but once.
    return ARCHITECTURES[90].shared if device.type == "cpu" else max_shared_mem(device.index)


def first_fitting(function: str, choices: Sequence[AnyChoice], shared: int) -> AnyChoice:
    """The first of some choices that takes no more than ``shared`` bytes."""
    for choice in choices:
        if choice.shared <= shared:
            return choice
    rule = f"tensors of these sizes need a GPU with {choices[-1].shared} bytes of shared memory for a block"
    raise RuntimeError(error(function, rule, shared, 'Use backend="torch".'))
