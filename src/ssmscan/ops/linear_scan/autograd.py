"""The registered operators of linear_scan: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 16

_INPUTS = "Tensor x, Tensor decay, Tensor? b, Tensor? c, Tensor? h0, Tensor? sequence"

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


def linear_scan(
    x: Tensor,
    decay: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    h0: Tensor | None,
    sequence: Tensor | None,
    log: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, decay, b, c, h0, sequence, log, reverse, backend)
    if needs_grad(x, decay, b, c, h0):
        return torch.ops.ssmscan.linear_scan_saving.default(*arguments)[:2]
    if observed(x):
        return torch.ops.ssmscan.linear_scan.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], False)[:2]


def _saving(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], True)


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, decay, b, c, h0, sequence, log, reverse, backend):
    batch, l, d = x.shape
    s = batch if h0 is None else h0.shape[0]
    return x.new_empty(batch, l, d), x.new_empty(s, d, dtype=state_dtype(x, decay, b, c, h0))


def _fake_saving(x, *arguments):
    batch, l, d = x.shape
    y, h = _fake_forward(x, *arguments)
    return y, h, h.new_empty(batch, (l + SPAN - 1) // SPAN, d)


def _fake_backward(x, decay, b, c, h0, sequence, states, dy, dh, log, reverse, needs, backend):
    batch, l, d = x.shape
    dx, da, db, dc = (
        (x if t is None else t).new_empty(batch if need else 0, l, d)
        for t, need in zip((x, decay, b, c), needs, strict=True)
    )
    return dx, da, db, dc, states.new_empty(0 if h0 is None else h0.shape[0], d)


def _setup(ctx, inputs, output):
    x, decay, b, c, h0, sequence, ctx.log, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, decay, b, c, h0, sequence, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, _):
    x, decay, b, c, h0, sequence, states = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    needs = list(ctx.needs_input_grad[:4])
    *gradients, dh0 = torch.ops.ssmscan.linear_scan_backward.default(
        x, decay, b, c, h0, sequence, states, dy, dh, ctx.log, ctx.reverse, needs, ctx.backend
    )
    dx, da, db, dc = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dx, da, db, dc, dh0.to(h0.dtype) if ctx.needs_input_grad[4] else None, None, None, None, None


define(f"linear_scan({_INPUTS}, bool log, bool reverse, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward)
define(
    f"linear_scan_saving({_INPUTS}, bool log, bool reverse, str backend) -> (Tensor y, Tensor h, Tensor states)",
    _saving,
    _fake_saving,
)
define(
    f"linear_scan_backward({_INPUTS}, Tensor states, Tensor dy, Tensor? dh, bool log, bool reverse, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor da, Tensor db, Tensor dc, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("linear_scan_saving", _setup, _differentiate, "linear_scan_backward")

linear_scan_step = define_step(
    "linear_scan_step(Tensor x, Tensor decay, Tensor? b, Tensor? c, Tensor(a!) h, Tensor? state_indices, "
    "bool log) -> Tensor",
    _load,
)
