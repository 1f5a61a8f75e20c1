"""Context: where the tokens are that a layer's own follow, or are followed by."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Extent(NamedTuple):
    """How many tokens of a sequence the processes have, in their order, and which of them is this one."""

    lengths: Sequence[int]
    rank: int = 0

    @property
    def here(self) -> slice:
        """The places of the tokens here."""
        before = sum(self.lengths[: self.rank])
        return slice(before, before + self.lengths[self.rank])

    @property
    def total(self) -> int:
        return sum(self.lengths)


class Context:
    """A sequence that one process holds.

    A layer asks its context for everything that crosses tokens, so that :mod:`ssmscan.distributed` can put in its place
    one whose sequence is split over several processes.
    """

    # Whether other processes hold tokens of the sequence.
    split = False

    def run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation of :mod:`ssmscan.ops` along the sequence."""
        return operation(*args, **kwargs)

    def extent(self, length: int, device: torch.device) -> Extent:
        """Where the ``length`` tokens here lie in the sequence."""
        return Extent((length,))

    def gather(self, extent: Extent, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each of several tensors of one dtype of all tokens, (b, total, ...), from those of the tokens here."""
        return parts
