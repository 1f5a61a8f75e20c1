"""Context: where the tokens are that a layer's own follow, or are followed by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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

    def extent(self, length: int, device: torch.device) -> tuple[int, int]:
        """How many tokens of the sequence come before the ``length`` tokens here, and how many there are in all."""
        return 0, length

    def gather(self, x: Tensor) -> Tensor:
        """x of all tokens, (b, total, ...), from x of those here, (b, l, ...)."""
        return x
