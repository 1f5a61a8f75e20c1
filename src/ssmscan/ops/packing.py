"""Packed sequences: the check of ``cu_seqlens`` and the form in which kernels read it.

A kernel needs only to know, at each token, whether a neighbour belongs to another sequence. So ``cu_seqlens`` becomes
one int32 sequence number per token: the same for both directions, safe for any content, made without a host
synchronisation.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ssmscan.shapes import INDEX, error


def check_cu_seqlens(function: str, cu_seqlens: Tensor, b: int, l: int, device: torch.device) -> None:
    """``cu_seqlens`` is (s+1,), int32 or int64, 0 = c_0 <= c_1 <= … <= c_s = l, and the batch is 1.

    The values of a CUDA tensor, or under torch.compile, are not read here, for that would stall the stream;
    see :func:`pack` for what happens to bad ones.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            error(function, "cu_seqlens must be a torch.Tensor", type(cu_seqlens).__name__, "Use torch.tensor.")
        )
    if cu_seqlens.dtype not in INDEX:
        raise TypeError(error(function, "cu_seqlens must be int32 or int64", cu_seqlens.dtype, "Convert it."))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(error(function, "cu_seqlens must have shape (s+1,)", tuple(cu_seqlens.shape)))
    if cu_seqlens.device != device:
        raise ValueError(
            error(function, f"cu_seqlens must be on the device of x, {device}", cu_seqlens.device, "Move it there.")
        )
    if b != 1:
        raise ValueError(
            error(function, "x must have batch 1 with cu_seqlens", b, "Concatenate the sequences along the length.")
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != l:
            raise ValueError(
                error(
                    function,
                    f"cu_seqlens must start at 0 and end at the length {l}",
                    f"{values[0]} … {values[-1]}",
                )
            )
        for before, after in pairwise(values):
            if after < before:
                raise ValueError(error(function, "cu_seqlens must not decrease", f"{before} then {after}"))


def pack(cu_seqlens: Tensor, l: int, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence number of each token, (l,) int32, and the initial states (s, ...).

    Bad values that could not be refused on the host turn the initial states, and with them every output, into NaN.
    """
    ends = cu_seqlens[1:]
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == l) & (ends >= cu_seqlens[:-1]).all()
    tokens = torch.arange(l, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(ends, tokens, right=True).clamp_(max=max(ends.shape[0] - 1, 0))
    return sequence.to(torch.int32), torch.where(valid, h0, torch.nan)


def first_tokens(sequence: Tensor, reverse: bool) -> Tensor:
    """Which tokens, (l,) bool, come first in their sequence in scan order."""
    changes = sequence[1:] != sequence[:-1]
    edge = sequence[:1] == sequence[:1]
    return torch.cat([changes, edge] if reverse else [edge, changes])


def last_tokens(sequence: Tensor, s: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The last token of each of the s sequences in scan order, and whether the sequence is empty; both (s,)."""
    numbers = torch.arange(s, device=sequence.device, dtype=sequence.dtype)
    first, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    token = first if reverse else end - 1
    return token.clamp(0, sequence.shape[0] - 1), first == end
