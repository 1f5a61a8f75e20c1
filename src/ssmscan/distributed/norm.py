"""A gated norm whose groups of channels are larger than what a rank has of them, and the projection behind it."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ssmscan.backend import choose
from ssmscan.distributed.collectives import copy, total
from ssmscan.layers import GatedRMSNorm
from ssmscan.ops.gated_rms_norm.autograd import Inputs, Options, gated_rms_norm
from ssmscan.shapes import product_dtype, state_dtype


class Undivided(NamedTuple):
    """What a norm makes before it divides by the root: ``y``, (..., d), and the sum of ``squares``, (..., 1)."""

    y: Tensor
    squares: Tensor


class SplitGatedRMSNorm(GatedRMSNorm):
    """A :class:`ssmscan.layers.GatedRMSNorm` over channels that the ranks of ``mesh`` share: they sum the squares.

        Σᵣ Wᵣ yᵣ / √(Σᵣ sᵣ / d + ε),    yᵣ the rank's channels before the division, sᵣ the sum of their squares

    One number divides all channels of a token, so it divides what the projection behind the norm makes of them:
    :meth:`project`. The squares are summed while that is made, and in the backward nothing is, for all ranks have the
    projection's output and its gradient.
    """

    def __init__(self, norm: GatedRMSNorm, mesh: DeviceMesh) -> None:
        channels = norm.weight.shape[0]
        self.groups = channels // norm.group_size
        super().__init__(channels, norm.eps, self.groups, norm.norm_before_gate, device="meta", dtype=norm.dtype)
        self.weight = norm.weight
        self.mesh = mesh

    @torch.compiler.disable
    def forward(self, x: Tensor, z: Tensor) -> Undivided:
        dtype = state_dtype(x, self.weight, z)
        make = _Gated.apply if choose("parallelize", "auto", x.device.type, dtype) == "triton" else gated
        return Undivided(*make(x, self.weight, z, self.norm_before_gate))

    def project(self, normed: Undivided, weight: Tensor) -> Tensor:
        """The sum over the ranks of ``weight`` times the rank's channels of the norm."""
        group = self.mesh.get_group()
        if self.groups == 1:
            return _project(*normed, weight, group, self.group_size, self.eps)
        # Each rank has channels of one of several groups, so the ranks' summands are divided by several numbers.
        own = self.mesh.get_local_rank() * self.groups // self.mesh.size()
        squares = F.pad(normed.squares, (own, self.groups - own - 1))
        mean = copy(total(squares, group), group)[..., own : own + 1] / self.group_size
        y = normed.y * torch.rsqrt(mean + self.eps)
        return total(F.linear(y.to(normed.y.dtype), weight), group)


def gated(x: Tensor, weight: Tensor, z: Tensor, norm_before_gate: bool) -> Undivided:
    """The norm before it divides by the root, in plain PyTorch."""
    dtype = state_dtype(x, weight, z)
    u, gate = x.to(dtype), F.silu(z.to(dtype))
    if norm_before_gate:
        return Undivided((u * weight * gate).to(x.dtype), u.square().sum(-1, keepdim=True))
    u = u * gate
    return Undivided((u * weight).to(x.dtype), u.square().sum(-1, keepdim=True))


class _Gated(torch.autograd.Function):
    """The same by the Triton kernels of gated_rms_norm, without the division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, z: Tensor, norm_before_gate: bool) -> tuple[Tensor, Tensor]:
        inputs = Inputs(x, weight, z)
        # What is added to the mean is not asked for.
        ctx.options = Options(0.0, x.shape[-1], norm_before_gate, x.dtype)
        ctx.save_for_backward(*inputs)
        return gated_rms_norm.load("triton", "forward")(inputs, ctx.options, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dsquares: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = Inputs(*ctx.saved_tensors), ctx.needs_input_grad[:3]
        gradients = gated_rms_norm.load("triton", "backward")(inputs, dy, ctx.options, needs, dsquares.contiguous())
        return *gradients, None


@torch.compiler.disable
def _project(y: Tensor, squares: Tensor, weight: Tensor, group: dist.ProcessGroup, channels: int, eps: float) -> Tensor:
    return _Project.apply(y, squares, weight, group, channels, eps)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, squares: Tensor, weight: Tensor, group: dist.ProcessGroup, channels: int, eps: float
    ) -> Tensor:
        squares = squares.clone()
        summing = dist.all_reduce(squares, group=group, async_op=True)
        y, weight = y.to(product_dtype(y)), weight.to(product_dtype(y))
        product = F.linear(y, weight)
        dist.all_reduce(product, group=group)
        summing.wait()
        scale = torch.rsqrt(squares / channels + eps)
        ctx.channels = channels
        ctx.save_for_backward(y, weight, product, scale)
        # In the product's dtype at once, with the scale in its own.
        return torch.mul(product, scale, out=torch.empty_like(product))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, product, scale = ctx.saved_tensors
        dscale = (d * product).sum(-1, keepdim=True, dtype=scale.dtype)
        dsquares = dscale * scale**3 * (-0.5 / ctx.channels)
        dproduct = torch.mul(d, scale, out=torch.empty_like(product))
        dweight = dproduct.flatten(0, -2).T @ y.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return dproduct @ weight, dsquares, dweight, None, None, None
