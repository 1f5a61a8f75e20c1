"""Several processes as one run: what each takes of a batch, what they add up, and the end when one is gone."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ssmscan.distributed import full_state_dict, parallelize
from ssmscan.distributed.sharding import sum_gradients, synchronise
from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import error
from ssmscan.tasks import Batch, Measure
from ssmscan.training.config import MeshConfig, TrainConfig
from ssmscan.training.errors import RunError, UsageError
from ssmscan.training.ranks import Ranks

# What the backends say when there is no word from another process; when it did not answer; when it is gone.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|socket", re.IGNORECASE)
_SILENT = re.compile(r"time(d |-)?out", re.IGNORECASE)
_GONE = re.compile(r"closed|reset|refused|broken pipe|0 bytes|process exited", re.IGNORECASE)


class MeshRanks(Ranks):
    """One of the processes of a mesh with the dimensions dp, cp and tp, those of one rank left out.

    Of ``config`` it takes how the parameters are held.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh, config: MeshConfig | None = None) -> None:
        super().__init__(device)
        self.mesh, self.config = mesh, config or MeshConfig()
        self.count = mesh.size()
        self.first = dist.get_rank() == 0

    def _place(self, dimension: str) -> tuple[int, int]:
        """This process's place along a dimension, and how many there are."""
        if dimension not in (self.mesh.mesh_dim_names or ()):
            return 0, 1
        return self.mesh.get_local_rank(dimension), self.mesh[dimension].size()

    def arrange(self, model: SSMForCausalLM, products: torch.dtype) -> SSMForCausalLM:
        narrow = None if products == torch.float32 else products
        try:
            parallelize(
                model,
                self.mesh,
                shard=self.config.shard,
                param_dtype=narrow,
                reshard_after_forward=self.config.reshard,
            )
        except (TypeError, ValueError, NotImplementedError) as reason:
            raise UsageError(str(reason)) from None
        return model

    def whole(self, model: SSMForCausalLM) -> SSMForCausalLM | None:
        state = full_state_dict(model)
        if not self.first:
            return None
        whole = SSMForCausalLM(model.config)
        whole.load_state_dict(state)
        return whole.to(self.device)

    def share(self, examples: int) -> int:
        return examples // self._place("dp")[1]

    def rows(self, batch: Batch, share: int) -> Batch:
        return batch.rows(self._place("dp")[0] * share, share)

    def stretch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        place, ranks = self._place("cp")
        l = inputs["input_ids"].shape[1]
        own = slice(place * l // ranks, (place + 1) * l // ranks)
        # The bounds of packed sequences are those in the whole.
        return {name: tensor if name == "cu_seqlens" else tensor[:, own] for name, tensor in inputs.items()}

    def before_backward(self, model: SSMForCausalLM, last: bool) -> None:
        if not self.config.reshard:
            synchronise(model, last)

    def after_backwards(self, model: SSMForCausalLM) -> None:
        if not self.config.shard:
            sum_gradients(model, self.mesh)

    # Without gradients, for to_local would make a node for each.
    @torch.no_grad()
    def clip(self, parameters: list[nn.Parameter], longest: float) -> Tensor:
        # By what each process has of them, for an operation on a DTensor costs the host as much as many launches.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for gradient in gradients:
            if isinstance(gradient, DTensor):
                kept.setdefault(_sharing(gradient), []).append(gradient.to_local())
            else:
                kept.setdefault((), []).append(gradient)
        squares = []
        for groups, own in kept.items():
            part = nn.utils.get_total_norm(own).square()
            for group in groups:
                dist.all_reduce(part, group=group)
            squares.append(part)
        norm = torch.stack(squares).sum().sqrt()
        scale = (longest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([tensor for own in kept.values() for tensor in own], scale)
        return norm

    def add_up(self, measures: dict[str, Measure]) -> dict[str, Measure]:
        sums = torch.tensor([[float(part) for part in measure] for measure in measures.values()], dtype=torch.float64)
        for dimension in ("dp", "cp"):
            if self._place(dimension)[1] > 1:
                dist.all_reduce(sums, group=self.mesh.get_group(dimension))
        return {name: Measure(*row) for name, row in zip(measures, sums, strict=True)}

    def told(self, number: int) -> int:
        message = torch.tensor([number])
        dist.broadcast(message, src=0)
        return int(message)

    def either(self, *flags: bool) -> tuple[bool, ...]:
        together = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in together)

    def meet(self) -> None:
        self.told(0)


def _sharing(tensor: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """The processes that have other parts of ``tensor`` than this one, along each dimension of its mesh."""
    placed = enumerate(tensor.placements)
    return tuple(tensor.device_mesh.get_group(i) for i, placement in placed if not placement.is_replicate())


@contextmanager
def joined_mesh(config: TrainConfig, sizes: dict[str, int], device: torch.device) -> Iterator[MeshRanks]:
    """The processes that torchrun started, as a mesh of so many ranks along each dimension."""
    _check(config, sizes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What the host says goes by gloo, for which no device is waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    begun = dist.is_initialized()
    try:
        if not begun:
            dist.init_process_group(backend, timeout=timedelta(seconds=config.mesh.timeout))
        used = {name: size for name, size in sizes.items() if size > 1}
        mesh = init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))
        yield MeshRanks(device, mesh, config.mesh)
    except RuntimeError as failure:
        lost = None if isinstance(failure, RunError) else _lost(failure, config.mesh.timeout)
        if lost is None:
            raise
        advice = f"Continue with torchrun … -m ssmscan train --resume {config.out}."
        raise RunError(error("train", "all processes must go on", lost, advice)) from failure
    # Not after a failure, for a group waits for all.
    if not begun:
        # Recorded steps hold what the group is to give up.
        gc.collect()
        dist.destroy_process_group()


def _lost(failure: RuntimeError, timeout: float) -> str | None:
    """What has become of another process; None where the failure is this one's."""
    said = str(failure)
    if not (isinstance(failure, dist.DistError) or _LOST.search(said)):
        return None
    if _SILENT.search(said):
        return f"one that has not answered for {timeout:g} s"
    return "one that is gone" if _GONE.search(said) else f"one that cannot be reached ({said.splitlines()[0]})"


def _check(config: TrainConfig, sizes: dict[str, int]) -> None:
    """Refuse what several processes cannot do."""
    share, rest = divmod(config.batch_size, sizes["dp"])
    if rest:
        raise UsageError(error("train", f"batch_size must be a multiple of dp = {sizes['dp']}", config.batch_size))
    if config.micro_batch_size is not None and share % min(config.micro_batch_size, share):
        rule = f"micro_batch_size must divide batch_size / dp = {share}"
        raise UsageError(error("train", rule, config.micro_batch_size))
    if config.precision == "float16":
        advice = "Use --precision bfloat16."
        raise UsageError(error("train", "precision must not be float16 on several processes", "float16", advice))
    if config.cuda_graph and sizes["cp"] > 1:
        raise UsageError(error("train", "cuda_graph must be false where sequences are split (cp)", "true"))
    if config.cuda_graph and sizes["dp"] > 1 and config.mesh.shard:
        advice = "Use --mesh.shard false, where a process has the memory for all weights, or --cuda_graph false."
        raise UsageError(error("train", "cuda_graph must be false where weights are sharded", "true", advice))
