"""The registered operators of selective_scan: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 104

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0, "
    "Tensor? sequence"
)

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


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, dt, A, B, C, D, z, dt_bias, h0, sequence, softplus, reverse, backend)
    if needs_grad(x, dt, A, B, C, D, z, dt_bias, h0):
        return torch.ops.ssmscan.selective_scan_saving.default(*arguments)[:2]
    if observed(x):
        return torch.ops.ssmscan.selective_scan.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], False)[:2]


def _saving(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], True)


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, dt, A, B, C, D, z, dt_bias, h0, sequence, softplus, reverse, backend):
    s = x.shape[0] if h0 is None else h0.shape[0]
    h = x.new_empty(s, *A.shape, dtype=state_dtype(x, dt, A, B, C, D, z, dt_bias, h0))
    return x.new_empty(x.shape), h


def _fake_saving(x, dt, A, *arguments):
    batch, l, d = x.shape
    y, h = _fake_forward(x, dt, A, *arguments)
    return y, h, h.new_empty(batch, (l + SPAN - 1) // SPAN, A.shape[1], d)


def _fake_backward(x, dt, A, B, C, D, z, dt_bias, h0, sequence, states, dy, dh, softplus, reverse, needs, backend):
    gradients = [
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((x, dt, A, B, C, D, z, dt_bias), needs, strict=True)
    ]
    return *gradients, states.new_empty((0, *A.shape) if h0 is None else h0.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, _):
    *tensors, states = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    needs = list(ctx.needs_input_grad[:8])
    *gradients, dh0 = torch.ops.ssmscan.selective_scan_backward.default(
        *tensors, states, dy, dh, ctx.softplus, ctx.reverse, needs, ctx.backend
    )
    given = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *given, dh0.to(tensors[8].dtype) if ctx.needs_input_grad[8] else None, None, None, None, None


define(
    f"selective_scan({_INPUTS}, bool softplus, bool reverse, str backend) -> (Tensor y, Tensor h)",
    _forward,
    _fake_forward,
)
define(
    f"selective_scan_saving({_INPUTS}, bool softplus, bool reverse, str backend) "
    "-> (Tensor y, Tensor h, Tensor states)",
    _saving,
    _fake_saving,
)
define(
    f"selective_scan_backward({_INPUTS}, Tensor states, Tensor dy, Tensor? dh, bool softplus, bool reverse, "
    "bool[] needs, str backend) -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
    "Tensor ddt_bias, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("selective_scan_saving", _setup, _differentiate, "selective_scan_backward")

selective_scan_step = define_step(
    "selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? "
    "dt_bias, Tensor(a!) h, Tensor? state_indices, bool softplus) -> Tensor",
    _load,
)
