"""Model and optimizer of several processes on the disk, by torch.distributed.checkpoint.

Each process writes what it has, and names it by its place in the whole: any number of processes reads it, one too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from ssmscan.models import SSMForCausalLM
from ssmscan.training.step import Step


def save(folder: Path, update: Step) -> None:
    """Write model and optimizer to ``folder``; every process of the run calls it."""
    with _as_one_process_fails(folder):
        dcp.save(_state(update), checkpoint_id=folder)


def load(folder: Path, update: Step) -> None:
    """Read what :func:`save` wrote, whatever the number of processes then."""
    state = _state(update)
    with _as_one_process_fails(folder):
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(update.model, update.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    update.set_rate()


def load_whole(path: Path, optimizer: dict[str, Any], update: Step) -> None:
    """Read on several processes what one process has saved: the file of the model, and the optimizer's state_dict."""
    model = SSMForCausalLM(update.model.config)
    load_model(model, path)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(update.model, model.state_dict(), options=options)
    # By the names of the parameters in place of their numbers, which count them in the order of the groups.
    names = {parameter: name for name, parameter in update.model.named_parameters()}
    order = [names[parameter] for group in update.optimizer.param_groups for parameter in group["params"]]
    named: dict[str, Any] = {
        "state": {order[i]: state for i, state in optimizer["state"].items()},
        "param_groups": [
            group | {"params": [order[i] for i in group["params"]]} for group in optimizer["param_groups"]
        ],
    }
    set_optimizer_state_dict(update.model, update.optimizer, named, options=options)
    update.set_rate()


def _state(update: Step) -> dict[str, Any]:
    model, optimizer = get_state_dict(update.model, update.optimizer)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def _as_one_process_fails(folder: Path) -> Iterator[None]:
    """Raise what failed in some process, a full disk for example, in all of them; say nothing of a process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except CheckpointException as failure:
            first, _ = next(iter(failure.failures.values()))
            if isinstance(first, OSError):
                raise OSError(first.errno, first.strerror, first.filename or str(folder)) from None
            raise first from None
