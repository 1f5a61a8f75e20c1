"""Where sequences lie in chunks of 64 tokens, of which none meets two sequences.

There is room for as many chunks as packed sequences can need, whatever their lengths, so nothing is read on the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmscan.ops.s4d.system import CHUNK


@dataclass(frozen=True)
class Layout:
    """The chunks of s sequences in scan order."""

    begin: Tensor  # the first chunk of each sequence, (s,)
    chunks: Tensor  # how many it has, (s,)
    length: Tensor  # its tokens, (s,)
    sequence: Tensor  # whose each token is, (l,)
    place: Tensor  # the number of tokens before it there, in scan order, (l,)
    rows: int  # chunks that there is room for

    def owners(self) -> tuple[Tensor, Tensor]:
        """Which chunks are a sequence's first, and whose each is, both (rows,). Of those left over nothing is read."""
        row = torch.arange(self.rows, device=self.begin.device)
        owner = torch.searchsorted(self.begin + self.chunks, row, right=True).clamp(max=self.begin.shape[0] - 1)
        return row == self.begin[owner], owner

    def tokens(self, in_front: bool) -> Tensor:
        """Where each token lies, (l,), if a sequence is filled up with zeros ``in_front`` of it, or else behind it."""
        start = self.begin * CHUNK
        if in_front:
            start = start + self.chunks * CHUNK - self.length
        return start[self.sequence] + self.place

    def lay(self, x: Tensor, in_front: bool) -> Tensor:
        """x (1, l, d) as (d, 1, 64·rows)."""
        chunks = x.new_zeros(x.shape[2], self.rows * CHUNK)
        return chunks.index_copy(1, self.tokens(in_front), x[0].t())[:, None]

    def gather(self, y: Tensor, in_front: bool) -> Tensor:
        """The inverse of :meth:`lay`."""
        return y[:, 0].index_select(1, self.tokens(in_front)).t()[None]


def packed(sequence: Tensor, s: int, reverse: bool) -> Layout:
    """The layout of packed sequences, of which ``sequence`` gives the number of each token."""
    token = torch.arange(sequence.shape[0], device=sequence.device)
    numbers = torch.arange(s, device=sequence.device, dtype=sequence.dtype)
    first, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    count = (end - first + CHUNK - 1) // CHUNK
    owner = sequence.long()
    place = end[owner] - 1 - token if reverse else token - first[owner]
    return Layout(count.cumsum(0) - count, count, end - first, owner, place, sequence.shape[0] // CHUNK + s)


def remainder(length: Tensor) -> Tensor:
    """The tokens of a chunk that is not full, of 64 where all are; 0 of no token."""
    return length - (length - 1).clamp(min=0) // CHUNK * CHUNK
