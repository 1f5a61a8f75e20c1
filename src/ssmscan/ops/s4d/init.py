"""Where the poles of S4D start: the values of A for training from scratch."""

import math

import torch
from torch import Tensor


def s4d_lin(d: int, n: int) -> Tensor:
    """S4D-Lin, poles on a vertical line: A_n = -1/2 + iπn for every channel.

    Only one pole of each conjugate pair is kept, so n of them are a real state of size 2n.

    Args:
        d: channels.
        n: states of a channel.

    Returns:
        A, (d, n), complex64.

    Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022), section 4.

    Example:
        >>> from ssmscan.ops import s4d_lin
        >>> s4d_lin(1, 2).real.tolist(), s4d_lin(1, 2).imag.tolist()
        ([[-0.5, -0.5]], [[0.0, 3.1415927410125732]])
    """
    imaginary = math.pi * torch.arange(n, dtype=torch.float32)
    return torch.complex(torch.full((d, n), -0.5, dtype=torch.float32), imaginary.expand(d, n))


def s4d_real(d: int, n: int) -> Tensor:
    """S4D-Real, real poles: A_n = -(n+1) for every channel.

    Args:
        d: channels.
        n: states of a channel.

    Returns:
        A, (d, n), float32.

    Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022), section 4.

    Example:
        >>> from ssmscan.ops import s4d_real
        >>> s4d_real(1, 3).tolist()
        [[-1.0, -2.0, -3.0]]
    """
    return -torch.arange(1, n + 1, dtype=torch.float32).repeat(d, 1)
