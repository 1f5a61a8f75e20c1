"""The registered operators of ssd: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0, "
    "Tensor? sequence"
)
_OPTIONS = "bool softplus, float low, float high, bool reverse"

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


def ssd(
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
    low: float,
    high: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, dt, A, B, C, D, z, dt_bias, h0, sequence, softplus, low, high, reverse, backend)
    if needs_grad(x, dt, A, B, C, D, z, dt_bias, h0) or observed(x):
        return torch.ops.ssmscan.ssd.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1])


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, dt, A, B, C, D, z, dt_bias, h0, *_):
    batch, l, heads, p = x.shape
    s = batch if h0 is None else h0.shape[0]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    return x.new_empty(batch, l, heads, p), x.new_empty(s, heads, p, B.shape[3], dtype=dtype)


def _fake_backward(x, dt, A, B, C, D, z, dt_bias, h0, sequence, dy, dh, *options):
    gradients = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, z, dt_bias)]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    wanted = options[-2]
    return *gradients, x.new_empty(h0.shape if wanted else (0,), dtype=dtype)


def _setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.low, ctx.high, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh):
    x, *_, h0, _ = inputs = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    needs = ctx.needs_input_grad[:9]
    *gradients, dh0 = torch.ops.ssmscan.ssd_backward.default(
        *inputs, dy, dh, ctx.softplus, ctx.low, ctx.high, ctx.reverse, needs[8], ctx.backend
    )
    gradients.append(dh0.to(h0.dtype) if needs[8] else dh0)
    return *(v if need else None for v, need in zip(gradients, needs, strict=True)), *(None,) * 6


define(f"ssd({_INPUTS}, {_OPTIONS}, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward)
define(
    f"ssd_backward({_INPUTS}, Tensor dy, Tensor? dh, {_OPTIONS}, bool initial, str backend) -> (Tensor dx, Tensor ddt, "
    "Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("ssd", _setup, _differentiate, "ssd_backward")

ssd_step = define_step(
    "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor(a!) h, Tensor? state_indices, bool softplus, float low, float high) -> Tensor",
    _load,
)
