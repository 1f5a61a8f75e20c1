"""What every task is: a source of batches that any step can be asked for, and what is measured of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.shapes import check_integer, error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssmscan.models import SSMForCausalLM

# Target of a position that is not part of the answer: no loss, no metric.
IGNORE = -100

Split = Literal["train", "eval"]
_SPLITS: tuple[Split, ...] = ("train", "eval")


class Batch(NamedTuple):
    """``tokens`` (b, l) and the answer ``targets`` (b, l), IGNORE where none is asked for; int64.

    ``starts`` (b, l), bool, is True at the first token of each document that begins inside a row; a row is one document
    where it is None.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None = None

    def rows(self, first: int, count: int) -> Batch:
        """``count`` examples from ``first`` on, or as many as there are."""
        kept = slice(first, first + count)
        return Batch(self.tokens[kept], self.targets[kept], None if self.starts is None else self.starts[kept])

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of :class:`ssmscan.models.SSMForCausalLM`, on ``device``.

        Rows of several documents become one row of packed sequences, so that no state passes from one to the next.
        Empty sequences at its end make their number a power of 2: few shapes come, for which kernels are launched from
        a record.
        """
        tokens, targets, cu_seqlens = self.tokens, self.targets, None
        if self.starts is not None:
            bounds = self.starts.clone()
            bounds[:, 0] = True
            first = bounds.flatten().nonzero().flatten()
            room = 1 << (len(first) - 1).bit_length()
            cu_seqlens = F.pad(first, (0, room + 1 - len(first)), value=tokens.numel()).to(torch.int32)
            tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        named = {"input_ids": tokens, "shift_labels": targets, "cu_seqlens": cu_seqlens}
        # From pinned memory the host does not wait for the copy.
        return {
            name: (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)
            for name, part in named.items()
            if part is not None
        }


class Measure(NamedTuple):
    """A metric as a sum over so many answers, both scalars: measures of batches of any size, on any rank, add up."""

    total: Tensor
    answers: Tensor


class Task(ABC):
    """A stream of batches for training and another for evaluation, each a function of seed and index alone.

    A task is a frozen dataclass: its fields are what a recipe says of it beside its name.
    """

    name: ClassVar[str]
    # Whether the answer at a token is in those that follow, which the model then must not see.
    foretells: ClassVar[bool] = False
    # The names of what is measured.
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens v."""

    @property
    @abstractmethod
    def example_length(self) -> int:
        """Length l of an example (tokens)."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The task in a line, for a plot."""

    @abstractmethod
    def batch(self, size: int, seed: int, index: int, split: Split) -> Batch:
        """Batch number ``index`` of ``size`` examples from the stream ``split`` of ``seed``."""

    @abstractmethod
    def render(self, tokens: Tensor, targets: Tensor, predictions: Tensor) -> str:
        """One example, all arguments (l,), as a person would read it."""

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, Measure]:
        """What is told of an evaluation: logits (b, l, v) and targets (b, l) of one batch.

        ``loss`` is the cross entropy of the answers (nats), ``accuracy`` the fraction that the greatest logit names.
        """
        return measure(logits, targets)

    def examine(self, model: SSMForCausalLM, seed: int) -> dict[str, Measure]:
        """What is measured once, when the training has ended; nothing unless the task says more."""
        return {}

    @property
    def held_out_examples(self) -> int | None:
        """How many examples there are to evaluate on; None is any number."""
        return None

    def pinned(self) -> Self:
        """The task as a run writes it down, so that it cannot be continued on other data."""
        return self

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What turns tokens into text and back, where they are text."""
        return None


def measure(logits: Tensor, targets: Tensor) -> dict[str, Measure]:
    """``loss`` and ``accuracy`` of logits (b, l, v) by targets (b, l)."""
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) & asked
    return {
        "loss": Measure(cross_entropy(logits, targets, "sum").double(), asked.sum()),
        "accuracy": Measure(right.sum(), asked.sum()),
    }


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Cross entropy of the answer tokens, in nats: logits (b, l, v), targets (b, l), a scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


def generator(seed: int, index: int, split: Split) -> np.random.Generator:
    """The random numbers of one batch.

    A counter-based generator: seed and split are its key and index the high word of its counter, so the streams of
    training and evaluation, and the batches of one stream, share no number; and any batch can be had without those
    before it, which makes a resumed run exact.
    """
    key = np.array([seed, _SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def check_shortest(task: str, shortest: int | None, least: int, length: int) -> None:
    """``shortest`` of a task is None or a length of examples, ``least`` to ``length`` (tokens)."""
    if shortest is None:
        return
    check_integer(task, "shortest", shortest, least)
    if shortest > length:
        raise ValueError(error(task, f"shortest must be at most length = {length}", shortest))


def draw_length(random: np.random.Generator, length: int, shortest: int | None) -> int:
    """One of ``length``, ``length // 2``, ``length // 4``, … that are not below ``shortest``; ``length`` where None."""
    return length if shortest is None else length >> int(random.integers((length // shortest).bit_length()))
