"""Model and optimizer of several processes on the disk, by torch.distributed.checkpoint.

Each process writes what it has of every tensor, with its place in the whole: any number of processes reads it, one too.
A tensor is named by its parameter in one process, the number of the piece, for tensor parallelism keeps some parameters
in pieces, and what it is: ``lm_head.weight/0/value``, or ``…/exp_avg`` and the like, of the optimizer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ssmscan.layers import decay_groups
from ssmscan.models import SSMForCausalLM
from ssmscan.training.step import Step

_VALUE = "value"


def save(folder: Path, update: Step) -> None:
    """Write model and optimizer to ``folder``; every process of the run calls it."""
    state: dict[str, Tensor] = {}
    for name, pieces in _pieces(update).items():
        for i, piece in enumerate(pieces):
            tensors = {_VALUE: piece.detach(), **update.optimizer.state[piece]}
            state |= {f"{name}/{i}/{what}": tensor for what, tensor in tensors.items()}
    with _as_one_process_fails(folder):
        dcp.save(state, checkpoint_id=folder)


def load(folder: Path, update: Step) -> None:
    """Read what :func:`save` wrote, whatever the processes and their mesh were then."""
    written: dict[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    pieces = {f"{name}/{i}": piece for name, own in _pieces(update).items() for i, piece in enumerate(own)}
    same = {key.rpartition("/")[0] for key in written} == pieces.keys()
    state = {
        key: _room(tensor.size, tensor.properties.dtype, pieces[key.rpartition("/")[0]] if same else None)
        for key, tensor in written.items()
    }
    with _as_one_process_fails(folder):
        dcp.load(state, checkpoint_id=folder)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        name, _, what = key.rpartition("/")
        tensors[name][what] = tensor
    if same:
        for name, piece in pieces.items():
            _restore(update, piece, tensors[name])
    else:
        _share_out(update, _joined(tensors))
    update.set_rate()


def load_whole(path: Path, optimizer: dict[str, Any], update: Step) -> None:
    """Read on several processes what one process has saved: the file of the model, and the optimizer's state_dict."""
    model = SSMForCausalLM(update.model.config)
    load_model(model, path)
    names = {parameter: name for name, parameter in model.named_parameters()}
    # The optimizer numbers them in the order of its groups.
    order = [names[parameter] for group in decay_groups(model) for parameter in group]
    tensors = {names[parameter]: {_VALUE: parameter.detach()} for parameter in names}
    for i, state in optimizer["state"].items():
        tensors[order[i]] |= state
    _share_out(update, tensors)
    update.set_rate()


def _pieces(update: Step) -> dict[str, list[nn.Parameter]]:
    """The parameters by their names in one process, of which :func:`ssmscan.distributed.parallelize` makes pieces."""
    pieces: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in update.named.items():
        owner, parametrized, rest = name.partition("parametrizations.")
        pieces[owner + rest.rpartition(".")[0] if parametrized else name].append(parameter)
    return pieces


def _room(size: torch.Size, dtype: torch.dtype, like: nn.Parameter | None) -> Tensor:
    """Where a tensor is read to: a share like that of its parameter, but all of it where there is no such share."""
    if like is not None and like.shape == size:
        return torch.empty_like(like.detach(), dtype=dtype)
    return torch.empty(size, dtype=dtype)


def _joined(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Whole parameters, by name, of the pieces ``name/0``, ``name/1`` …; the number of steps is that of the first."""
    lists: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    for key in sorted(tensors, key=lambda key: int(key.rpartition("/")[2])):
        lists[key.rpartition("/")[0]].append(tensors[key])
    return {
        name: {
            what: first if first.dim() == 0 or len(own) == 1 else torch.cat([piece[what] for piece in own])
            for what, first in own[0].items()
        }
        for name, own in lists.items()
    }


def _share_out(update: Step, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Restore this process's shares of whole parameters."""
    for name, pieces in _pieces(update).items():
        sizes = [piece.shape[0] for piece in pieces]
        for i, piece in enumerate(pieces):
            parts = {
                what: tensor if tensor.dim() == 0 or len(pieces) == 1 else tensor.split(sizes)[i]
                for what, tensor in tensors[name].items()
            }
            _restore(update, piece, {what: _share(part, piece) for what, part in parts.items()})


def _share(tensor: Tensor, like: nn.Parameter) -> Tensor:
    """What this process has of ``tensor``, where it has a share of ``like`` it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh, placements = like.device_mesh, like.placements
    sizes, begins = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    own = tensor[tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))]
    return DTensor.from_local(
        own.to(like.device).contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def _restore(update: Step, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    parameter.copy_(tensors[_VALUE])
    # A copy, for pieces would count their steps in one tensor.
    update.optimizer.state[parameter] = {
        what: tensor.to(parameter.device, copy=True) for what, tensor in tensors.items() if what != _VALUE
    }


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
