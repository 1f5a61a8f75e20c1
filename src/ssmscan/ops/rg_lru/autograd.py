"""The registered operators of rg_lru: schemas, shapes, and the derivative."""

import torch
from torch import Tensor

from ssmscan.ops.registration import define, define_step, differentiate, loader, needs_grad, observed
from ssmscan.shapes import state_dtype

# Steps between two of the states that the forward saves for the backward.
SPAN = 16

_INPUTS = (
    "Tensor x, Tensor input_gate, Tensor recurrence_gate, Tensor a_param, Tensor? h0, Tensor? sequence, bool reverse, "
    "bool scale_first"
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


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    h0: Tensor | None,
    sequence: Tensor | None,
    reverse: bool,
    scale_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, input_gate, recurrence_gate, a_param, h0, sequence, reverse, scale_first, backend)
    if needs_grad(x, input_gate, recurrence_gate, a_param, h0):
        return torch.ops.ssmscan.rg_lru_saving.default(*arguments)[:2]
    if observed(x):
        return torch.ops.ssmscan.rg_lru.default(*arguments)
    return _forward(*arguments)


def _forward(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], False)[:2]


def _saving(*arguments):
    return _load(arguments[-1], "forward")(*arguments[:-1], True)


def _backward(*arguments):
    return _load(arguments[-1], "backward")(*arguments[:-1])


def _fake_forward(x, input_gate, recurrence_gate, a_param, h0, sequence, *_):
    batch, l, d = x.shape
    s = batch if h0 is None else h0.shape[0]
    dtype = state_dtype(x, input_gate, recurrence_gate, a_param, h0)
    return x.new_empty(batch, l, d), x.new_empty(s, d, dtype=dtype)


def _fake_saving(x, *arguments):
    batch, l, d = x.shape
    y, h = _fake_forward(x, *arguments)
    return y, h, h.new_empty(batch, (l + SPAN - 1) // SPAN, d)


def _fake_backward(
    x, input_gate, recurrence_gate, a_param, h0, sequence, reverse, scale_first, states, dy, dh, needs, backend
):
    batch, l, d = x.shape
    sequences = [
        t.new_empty(batch if need else 0, l, d)
        for t, need in zip((x, input_gate, recurrence_gate), needs[:3], strict=True)
    ]
    da_param = a_param.new_empty(d if needs[3] else 0)
    return *sequences, da_param, states.new_empty(0 if h0 is None else h0.shape[0], d)


def _setup(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.scale_first, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, _):
    *tensors, states = ctx.saved_tensors
    x, h0 = tensors[0], tensors[4]
    if dy is None:
        dy = torch.zeros_like(x)
    needs = list(ctx.needs_input_grad[:4])
    *gradients, dh0 = torch.ops.ssmscan.rg_lru_backward.default(
        *tensors, ctx.reverse, ctx.scale_first, states, dy, dh, needs, ctx.backend
    )
    gradients = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *gradients, dh0.to(h0.dtype) if ctx.needs_input_grad[4] else None, None, None, None, None


define(f"rg_lru({_INPUTS}, str backend) -> (Tensor y, Tensor h)", _forward, _fake_forward)
define(f"rg_lru_saving({_INPUTS}, str backend) -> (Tensor y, Tensor h, Tensor states)", _saving, _fake_saving)
define(
    f"rg_lru_backward({_INPUTS}, Tensor states, Tensor dy, Tensor? dh, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dinput_gate, Tensor drecurrence_gate, Tensor da_param, Tensor dh0)",
    _backward,
    _fake_backward,
)
differentiate("rg_lru_saving", _setup, _differentiate, "rg_lru_backward")

rg_lru_step = define_step(
    "rg_lru_step(Tensor x, Tensor input_gate, Tensor recurrence_gate, Tensor a_param, Tensor(a!) h, "
    "Tensor? state_indices) -> Tensor",
    _load,
)
