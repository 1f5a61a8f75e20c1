"""A gated norm whose groups of channels are larger than what a rank has of them."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan.distributed.collectives import copy, total
from ssmscan.layers import GatedRMSNorm


class SplitGatedRMSNorm(GatedRMSNorm):
    """A :class:`ssmscan.layers.GatedRMSNorm` over channels that the ranks of ``group`` share: they sum the squares."""

    def __init__(self, norm: GatedRMSNorm, group: dist.ProcessGroup) -> None:
        channels = norm.weight.shape[0]
        self.groups = channels // norm.group_size
        super().__init__(channels, norm.eps, self.groups, norm.norm_before_gate, device="meta", dtype=norm.dtype)
        self.weight = norm.weight
        self.group = group

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        u, gate = x.to(dtype), F.silu(z.to(dtype))
        if not self.norm_before_gate:
            u = u * gate
        # Each rank has channels of one group.
        own = dist.get_rank(self.group) * self.groups // dist.get_world_size(self.group)
        squares = F.pad(u.square().sum(-1, keepdim=True), (own, self.groups - own - 1))
        mean = copy(total(squares, self.group), self.group)[..., own : own + 1] / self.group_size
        y = u * torch.rsqrt(mean + self.eps) * self.weight
        return (y * gate if self.norm_before_gate else y).to(x.dtype)
