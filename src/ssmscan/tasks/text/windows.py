"""Where the examples of a part of the text begin: shuffled anew in each epoch to train on, in order to evaluate on."""

from functools import lru_cache

import numpy as np

from ssmscan.tasks.task import generator


def shuffled(tokens: int, length: int, seed: int, first: int, count: int) -> np.ndarray:
    """Where ``count`` examples of a training begin, from number ``first`` on: (count,), int64.

    An epoch cuts the ring of ``tokens`` (behind the last comes the first) into windows of ``length`` and takes them in
    random order. Each epoch begins its cuts elsewhere, so every token is seen once in each, but for a rest shorter than
    a window, which is another one each time.

    Example:
        >>> from ssmscan.tasks.text.windows import shuffled
        >>> sorted(shuffled(tokens=40, length=10, seed=0, first=4, count=4).tolist())
        [8, 18, 28, 38]
    """
    windows = tokens // length
    epoch, place = divmod(first, windows)
    taken: list[np.ndarray] = []
    while count:
        offset, order = _epoch(windows, tokens, seed, epoch)
        here = order[place : place + count].astype(np.int64)
        taken.append((offset + here * length) % tokens)
        count -= len(here)
        epoch, place = epoch + 1, 0
    return np.concatenate(taken)


def in_order(tokens: int, length: int, first: int, count: int) -> np.ndarray:
    """Where ``count`` examples of an evaluation begin, from number ``first`` on; from the beginning behind the last.

    Example:
        >>> from ssmscan.tasks.text.windows import in_order
        >>> in_order(tokens=40, length=10, first=1, count=3).tolist()
        [10, 20, 0]
    """
    windows = whole(tokens, length)
    return (first % windows + np.arange(count)) % windows * length


def whole(tokens: int, length: int) -> int:
    """How many windows with a token behind each fit into so many tokens, one behind the other."""
    return (tokens - 1) // length


# Two, for a batch may have examples of two epochs.
@lru_cache(maxsize=2)
def _epoch(windows: int, tokens: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """Where an epoch's cuts begin, and the order of its windows."""
    random = generator(seed, epoch, "train")
    return int(random.integers(tokens)), random.permutation(np.arange(windows, dtype=np.uint32))
