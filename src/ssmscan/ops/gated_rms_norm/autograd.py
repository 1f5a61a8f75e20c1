"""The registered operators of gated_rms_norm: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, differentiate, loader, needs_grad, observed

_INPUTS = "Tensor x, Tensor weight, Tensor? z"
_OPTIONS = "float eps, SymInt size, bool norm_before_gate"

_load = loader(
    __package__,
    {
        ("triton", "forward"): "kernel_fwd",
        ("triton", "backward"): "kernel_bwd",
        ("cpu", "forward"): "cpu",
        ("cpu", "backward"): "cpu",
    },
)


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, size: int, norm_before_gate: bool, backend: str
) -> Tensor:
    arguments = (x, weight, z, eps, size, norm_before_gate, backend)
    if needs_grad(x, weight, z) or observed(x):
        return torch.ops.ssmscan.gated_rms_norm.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1])


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, weight, z, eps, size, norm_before_gate, backend):
    return x.new_empty(x.shape)


def _fake_backward(x, weight, z, dy, eps, size, norm_before_gate, needs, backend):
    dx, dweight, dz = (
        t.new_empty(t.shape if need else (0,))
        for t, need in zip((x, weight, x if z is None else z), needs, strict=True)
    )
    return dx, dweight, dz


def _setup(ctx, inputs, output):
    *saved, ctx.eps, ctx.size, ctx.norm_before_gate, ctx.backend = inputs
    ctx.save_for_backward(*saved)


def _differentiate(ctx, dy):
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.ssmscan.gated_rms_norm_backward.default(
        *ctx.saved_tensors, dy, ctx.eps, ctx.size, ctx.norm_before_gate, needs, ctx.backend
    )
    dx, dweight, dz = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dx, dweight, dz, None, None, None, None


define(f"gated_rms_norm({_INPUTS}, {_OPTIONS}, str backend) -> Tensor y", _forward, _fake_forward)
define(
    f"gated_rms_norm_backward({_INPUTS}, Tensor dy, {_OPTIONS}, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dz)",
    _backward,
    _fake_backward,
)
differentiate("gated_rms_norm", _setup, _differentiate, "gated_rms_norm_backward")
