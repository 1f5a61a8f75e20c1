"""The registered operators of ssd_bidirectional: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, differentiate, loader, needs_grad, observed

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_rev, "
    "Tensor? B_rev, Tensor? C_rev, Tensor? dt_bias, Tensor? h0, Tensor? sequence"
)
_OPTIONS = "bool softplus, bool shift"

_load = loader(
    __package__,
    {
        ("triton", "forward"): "kernel_fwd",
        ("triton", "backward"): "kernel_bwd",
        ("cpu", "forward"): "cpu",
        ("cpu", "backward"): "cpu",
    },
)


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_rev: Tensor | None,
    B_rev: Tensor | None,
    C_rev: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    shift: bool,
    backend: str,
) -> Tensor:
    arguments = (x, dt, A, B, C, D, z, dt_rev, B_rev, C_rev, dt_bias, h0, sequence, softplus, shift, backend)
    if needs_grad(*arguments[:11]) or observed(x):
        return torch.ops.ssmscan.ssd_bidirectional.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1])


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, *_):
    return x.new_empty(x.shape)


def _fake_backward(x, *arguments):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *arguments[:10]))


def _setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.shift, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    gradients = torch.ops.ssmscan.ssd_bidirectional_backward.default(
        *ctx.saved_tensors, dy, ctx.softplus, ctx.shift, ctx.backend
    )
    needs = ctx.needs_input_grad[:11]
    return *(v if need else None for v, need in zip(gradients, needs, strict=True)), *(None,) * 5


define(f"ssd_bidirectional({_INPUTS}, {_OPTIONS}, str backend) -> Tensor", _forward, _fake_forward)
define(
    f"ssd_bidirectional_backward({_INPUTS}, Tensor dy, {_OPTIONS}, str backend) -> (Tensor dx, Tensor ddt, Tensor dA, "
    "Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_rev, Tensor dB_rev, Tensor dC_rev, Tensor ddt_bias)",
    _backward,
    _fake_backward,
)
differentiate("ssd_bidirectional", _setup, _differentiate, "ssd_bidirectional_backward")
