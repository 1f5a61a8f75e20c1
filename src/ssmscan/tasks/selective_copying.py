"""Selective copying: pick the data tokens out of noise, and reproduce them in order."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ssmscan.tasks.copying import Copying


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Data tokens at random places among noise tokens, then markers at which they must be reproduced in order.

    It is :class:`Copying` but for these places. They differ from example to example, so a fixed delay cannot solve it:
    the model must look at each token to decide whether to store it.

    The arguments are those of :class:`Copying`; the task is that of Gu and Dao, "Mamba: Linear-Time Sequence Modeling
    with Selective State Spaces" (2023), section 4.1.1.

    Example:
        >>> from ssmscan.tasks import SelectiveCopying
        >>> task = SelectiveCopying(symbols=4, data_tokens=2, length=6)
        >>> batch = task.batch(size=1, seed=0, index=0, split="train")
        >>> sorted(batch.tokens[0, :6].tolist())[2:]
        [4, 4, 4, 4]
    """

    name: ClassVar[str] = "selective_copying"

    def _positions(self, random: np.random.Generator, size: int, length: int) -> np.ndarray:
        # Row by row, with as many random numbers as there are data tokens: one for each place, sorted, takes thirty
        # times as long in 4096 places.
        rows = [random.choice(length, self.data_tokens, replace=False, shuffle=False) for _ in range(size)]
        return np.sort(rows, 1)
