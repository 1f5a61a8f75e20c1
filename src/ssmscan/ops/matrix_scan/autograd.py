"""The registered operators of matrix_scan: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 16

_INPUTS = "Tensor x, Tensor log_a, Tensor? h0, Tensor? sequence"

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


def matrix_scan(
    x: Tensor, log_a: Tensor, h0: Tensor | None, sequence: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    arguments = (x, log_a, h0, sequence, reverse, backend)
    if needs_grad(x, log_a, h0):
        return torch.ops.ssmscan.matrix_scan_saving.default(*arguments)[:2]
    if observed(x):
        return torch.ops.ssmscan.matrix_scan.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], False)[:2]


def _saving(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], True)


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, log_a, h0, sequence, reverse, backend):
    batch, l, r, c = x.shape
    s = batch if h0 is None else h0.shape[0]
    return x.new_empty(batch, l, r, c), x.new_empty(s, r, c, dtype=state_dtype(x, log_a, h0))


def _fake_saving(x, *arguments):
    batch, l, r, c = x.shape
    y, h = _fake_forward(x, *arguments)
    return y, h, h.new_empty(batch, (l + SPAN - 1) // SPAN, r, c)


def _fake_backward(x, log_a, h0, sequence, states, dy, dh, reverse, needs, backend):
    batch, l, r, c = x.shape
    dx = x.new_empty(batch if needs[0] else 0, l, r, c)
    dlog_a = log_a.new_empty(batch if needs[1] else 0, l, r)
    return dx, dlog_a, states.new_empty(0 if h0 is None else h0.shape[0], r, c)


def _setup(ctx, inputs, output):
    x, log_a, h0, sequence, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, log_a, h0, sequence, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, _):
    x, log_a, h0, sequence, states = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    needs = list(ctx.needs_input_grad[:2])
    dx, dlog_a, dh0 = torch.ops.ssmscan.matrix_scan_backward.default(
        x, log_a, h0, sequence, states, dy, dh, ctx.reverse, needs, ctx.backend
    )
    dh0 = dh0.to(h0.dtype) if ctx.needs_input_grad[2] else None
    return dx if needs[0] else None, dlog_a if needs[1] else None, dh0, None, None, None


define(f"matrix_scan({_INPUTS}, bool reverse, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward)
define(
    f"matrix_scan_saving({_INPUTS}, bool reverse, str backend) -> (Tensor y, Tensor h, Tensor states)",
    _saving,
    _fake_saving,
)
define(
    f"matrix_scan_backward({_INPUTS}, Tensor states, Tensor dy, Tensor? dh, bool reverse, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dlog_a, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("matrix_scan_saving", _setup, _differentiate, "matrix_scan_backward")

matrix_scan_step = define_step(
    "matrix_scan_step(Tensor x, Tensor log_a, Tensor(a!) h, Tensor? state_indices) -> Tensor", _load
)
