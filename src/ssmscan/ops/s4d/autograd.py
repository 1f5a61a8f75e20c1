"""The registered operators of s4d: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed

_INPUTS = "Tensor x, Tensor z, Tensor B, Tensor C, Tensor? D, Tensor? h0, Tensor? sequence"

_load = loader(
    __package__,
    {
        ("triton", "forward"): "kernel_fwd",
        ("triton", "backward"): "kernel_bwd",
        ("triton", "step"): "kernel_step",
        ("cpu", "forward"): "cpu",
        ("cpu", "backward"): "cpu",
    },
)


def s4d(
    x: Tensor,
    z: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The scan of the discretised system, with z = log Ā; B, C, D and h0 are in the state's dtype."""
    if needs_grad(x, z, B, C, D, h0) or observed(x):
        return torch.ops.ssmscan.s4d.default(x, z, B, C, D, h0, sequence, reverse, backend)
    return _forward(x, z, B, C, D, h0, sequence, reverse, backend)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1])


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, z, B, C, D, h0, sequence, reverse, backend):
    return x.new_empty(x.shape), C.new_empty(x.shape[0] if h0 is None else h0.shape[0], *C.shape)


def _fake_backward(x, z, B, C, D, h0, sequence, dy, dh, reverse, backend):
    dD = C.new_empty(0 if D is None else D.shape[0], dtype=C.real.dtype)
    dh0 = C.new_empty(0 if h0 is None else h0.shape[0], *C.shape)
    return x.new_empty(x.shape), z.new_empty(z.shape), B.new_empty(B.shape), C.new_empty(C.shape), dD, dh0


def _setup(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh):
    x, z, B, C, D, h0, sequence = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dz, dB, dC, dD, dh0 = torch.ops.ssmscan.s4d_backward.default(
        x, z, B, C, D, h0, sequence, dy, dh, ctx.reverse, ctx.backend
    )
    return dx, dz, dB, dC, None if D is None else dD, None if h0 is None else dh0, None, None, None


define(f"s4d({_INPUTS}, bool reverse, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward)
define(
    f"s4d_backward({_INPUTS}, Tensor dy, Tensor? dh, bool reverse, str backend) -> "
    "(Tensor dx, Tensor dz, Tensor dB, Tensor dC, Tensor dD, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("s4d", _setup, _differentiate, "s4d_backward")

s4d_step = define_step(
    "s4d_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor(a!) h) -> Tensor",
    _load,
)
