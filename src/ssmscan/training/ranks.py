"""The processes of a run, of which there is one unless torchrun starts several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import error
from ssmscan.tasks import Batch, Measure
from ssmscan.training.config import TrainConfig
from ssmscan.training.errors import UsageError


class Ranks:
    """This process, which has everything; :class:`ssmscan.training.mesh.MeshRanks` is one of several.

    All processes call the methods together. ``count`` is how many there are; ``first`` whether this one tells of the
    run and writes what is not written by all.
    """

    count = 1
    first = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def arrange(self, model: SSMForCausalLM, products: torch.dtype) -> SSMForCausalLM:
        """The model as the processes share it, whose products are in a dtype by autocast; they drew the same one.

        Raises:
            UsageError: a layer cannot be shared so.
        """
        return model

    def whole(self, model: SSMForCausalLM) -> SSMForCausalLM | None:
        """In the first process the model as one process has it; None in the others."""
        return model

    def share(self, examples: int) -> int:
        """How many examples of a batch of so many one process has."""
        return examples

    def rows(self, batch: Batch, share: int) -> Batch:
        """The examples of a batch that this process has, ``share`` or as many as are there."""
        return batch

    def stretch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model for this process's stretch of their sequences."""
        return inputs

    def before_backward(self, model: SSMForCausalLM, last: bool) -> None:
        """Be told before a backward whether it is the ``last`` of a step."""

    def after_backwards(self, model: SSMForCausalLM) -> None:
        """Make the gradients those of all processes, where the backwards have not."""

    def clip(self, parameters: list[nn.Parameter], longest: float) -> Tensor:
        """Scale a gradient of a greater norm than ``longest`` down to that; the norm before, the same everywhere."""
        return nn.utils.clip_grad_norm_(parameters, longest)

    def add_up(self, measures: dict[str, Measure]) -> dict[str, Measure]:
        """What all processes measured, together."""
        return measures

    def told(self, number: int) -> int:
        """The number that the first process has."""
        return number

    def either(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag as true where it is in any process."""
        return flags

    def meet(self) -> None:
        """Wait for the others."""


def device_of(config: TrainConfig) -> torch.device:
    """The device that ``config`` asks for; in one of several processes its own."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(error("train", "device must be one of this machine", "cuda", "Use --device cpu."))
    if config.device == "cpu" or not available:
        if config.cuda_graph:
            raise UsageError(error("train", "cuda_graph must be false without CUDA", "true"))
        return torch.device("cpu")
    if started() == 1:
        return torch.device("cuda")
    local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    # By all processes of the machine, for one of them tells of it.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if here > devices:
        rule = f"processes of a machine must be at most its {devices} devices"
        raise UsageError(error("train", rule, here, "Start fewer, or use --device cpu."))
    return torch.device("cuda", local)


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The processes of the run, together while this lasts.

    Raises:
        UsageError: another number of processes than the mesh has, or what several cannot do.
        RunError: another process is gone.
    """
    device, processes = device_of(config), started()
    try:
        sizes = config.mesh.sizes(processes)
    except ValueError as reason:
        raise UsageError(str(reason)) from None
    if processes == 1:
        yield Ranks(device)
        return
    from ssmscan.training.mesh import joined_mesh

    with joined_mesh(config, sizes, device) as ranks:
        yield ranks


def is_first() -> bool:
    """Whether this process is the one that tells of a run."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process is the first of its machine; of all, where the environment says nothing of machines."""
    return os.environ["LOCAL_RANK"] == "0" if "LOCAL_RANK" in os.environ else is_first()


def started() -> int:
    """How many processes torchrun has started, as it says in their environment."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1
