"""The registered operators of causal_conv1d: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? h0, Tensor? sequence, Tensor? bounds"

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


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    bounds: Tensor | None,
    silu: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, weight, bias, h0, sequence, bounds, silu, reverse, backend)
    if needs_grad(x, weight, bias, h0) or observed(x):
        return torch.ops.ssmscan.causal_conv1d.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1])


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, weight, bias, h0, sequence, bounds, silu, reverse, backend):
    batch, l, d = x.shape
    s = batch if bounds is None else bounds.shape[0] - 1
    return x.new_empty(batch, l, d), x.new_empty(s, weight.shape[1] - 1, d, dtype=state_dtype(x, weight, bias, h0))


def _fake_backward(x, weight, bias, h0, sequence, bounds, dy, dh, silu, reverse, needs, backend):
    batch, l, d = x.shape
    w = weight.shape[1]
    return (
        x.new_empty(batch if needs[0] else 0, l, d),
        weight.new_empty(d if needs[1] else 0, w),
        (weight if bias is None else bias).new_empty(d if needs[2] else 0),
        x.new_empty(0 if h0 is None else h0.shape[0], w - 1, d, dtype=state_dtype(x, weight, bias, h0)),
    )


def _setup(ctx, inputs, output):
    *saved, ctx.silu, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh):
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[0])
    needs = list(ctx.needs_input_grad[:3])
    *gradients, dh0 = torch.ops.ssmscan.causal_conv1d_backward.default(
        *saved, dy, dh, ctx.silu, ctx.reverse, needs, ctx.backend
    )
    dx, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    h0 = saved[3]
    return dx, dweight, dbias, dh0.to(h0.dtype) if ctx.needs_input_grad[3] else None, None, None, None, None, None


define(
    f"causal_conv1d({_INPUTS}, bool silu, bool reverse, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward
)
define(
    f"causal_conv1d_backward({_INPUTS}, Tensor dy, Tensor? dh, bool silu, bool reverse, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("causal_conv1d", _setup, _differentiate, "causal_conv1d_backward")

causal_conv1d_step = define_step(
    "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) h, Tensor? state_indices, bool silu) "
    "-> Tensor",
    _load,
)
