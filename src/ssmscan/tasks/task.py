"""What every task is: a source of batches that any step can be asked for, and a metric."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Target of a position that is not part of the answer: no loss, no metric.
IGNORE = -100

Split = Literal["train", "eval"]
_SPLITS: tuple[Split, ...] = ("train", "eval")


class Batch(NamedTuple):
    """``tokens`` (b, l) and the answer ``targets`` (b, l), IGNORE where none is asked for; int64."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.targets.to(device))


class Task(ABC):
    """A stream of batches for training and another for evaluation, each a function of seed and index alone."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens v."""

    @abstractmethod
    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        """Batch number ``index`` of ``size`` examples from the stream ``split`` of ``seed``."""

    @abstractmethod
    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """One example, all arguments (l,), as a person would read it."""


def generator(seed: int, index: int, split: Split) -> np.random.Generator:
    """The random numbers of one batch.

    A counter-based generator: seed and split are its key and index the high word of its counter, so the streams of
    training and evaluation, and the batches of one stream, share no number; and any batch can be had without those
    before it, which makes a resumed run exact.
    """
    key = np.array([seed, _SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Fraction of the answer tokens that the greatest logit names: logits (b, l, v), targets (b, l), a scalar."""
    asked = targets != IGNORE
    return (logits.argmax(-1) == targets)[asked].float().mean()
