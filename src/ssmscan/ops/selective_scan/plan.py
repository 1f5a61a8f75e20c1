"""How the launches of selective_scan cover their tensors, and in what order the backward's lanes read and write."""

import torch
from torch import Tensor

from ssmscan.ops._triton.cover import Cover
from ssmscan.ops.packing import first_tokens
from ssmscan.ops.selective_scan.configs import BackwardConfig, Config

# A shorter segment is not worth its summary.
SHORTEST_SEGMENT = 64


def cover(batch: int, l: int, d: int, groups: int, config: Config | BackwardConfig, multiple: int) -> Cover:
    """Segments of a ``multiple`` of steps; few walkers get as many as fill the device, each but the last summarised."""
    blocks = -(-(d // groups) // config.BD)
    walkers = batch * groups * blocks
    wanted = min(config.programs // walkers, l // SHORTEST_SEGMENT) if walkers <= config.divided else 1
    # Two segments cost as much as one.
    if wanted < 3:
        wanted = 1
    return Cover.of(blocks, l, wanted, multiple)


def batch_time_group(*tensors: Tensor) -> tuple[int, ...]:
    """The strides of the first three axes of each tensor."""
    return tuple([stride for tensor in tensors for stride in tensor.stride()[:3]])


def runs_of(sequence: Tensor | None, reverse: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of each token in scan order: the number of its packed sequence, and where that starts and ends; int32 (l,)."""
    if sequence is None:
        return None, None, None
    owner = sequence.flip(0) if reverse else sequence
    l = owner.shape[0]
    token = torch.arange(l, device=owner.device, dtype=torch.int32)
    starts = torch.where(first_tokens(owner, False), token, 0).cummax(0).values
    ends = torch.where(first_tokens(owner, True), token + 1, l).flip(0).cummin(0).values.flip(0)
    return owner.to(torch.int32), starts.to(torch.int32), ends.to(torch.int32)


def rates_of(A: Tensor, N: int) -> Tensor:
    """A in float32, (d, N), with zeros up to N states."""
    if A.shape[1] == N:
        return A.float().contiguous()
    return torch.nn.functional.pad(A.float(), (0, N - A.shape[1])).contiguous()
