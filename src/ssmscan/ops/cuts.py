"""Packed sequences cut into chunks, none of which meets two sequences: for operations that work by chunks.

A chunk then needs no mask between sequences, and no sum runs across their bounds. Nothing is read on the host: there is
room for as many chunks as there can be, and those left over are empty.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Cuts(NamedTuple):
    """One number for each chunk, in scan order; positions, too, count in scan order."""

    begin: Tensor  # its first position
    length: Tensor  # how many positions it has, 0 in those left over
    sequence: Tensor  # whose it is
    first: Tensor  # whether it is that sequence's first
    last: Tensor  # or its last


def cut(sequence: Tensor, s: int, size: int, reverse: bool) -> Cuts:
    """Cut the s sequences, of which ``sequence`` gives the number of each token, into chunks of ``size``."""
    l = sequence.shape[0]
    numbers = torch.arange(s, device=sequence.device, dtype=sequence.dtype)
    begin, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    if reverse:
        begin, end = l - end.flip(0), l - begin.flip(0)
    # The chunks up to the end of each sequence.
    upto = ((end - begin + size - 1) // size).cumsum(0)
    chunk = torch.arange(s + l // size, device=sequence.device)
    place = torch.searchsorted(upto, chunk, right=True)
    left_over = place == s
    place = place.clamp(max=s - 1)
    before = torch.where(place > 0, upto[place - 1], 0)
    start = torch.where(left_over, l, begin[place] + (chunk - before) * size)
    stop = torch.where(left_over, l, torch.minimum(start + size, end[place]))
    owner = s - 1 - place if reverse else place
    return Cuts(start, stop - start, owner, (chunk == before) & ~left_over, (stop == end[place]) & ~left_over)
