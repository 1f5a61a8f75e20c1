"""The registered operators behind the fused backends: schemas, shapes, and the derivative.

``linear_scan`` is for inference: no derivative, and the least work on the host. ``linear_scan_saving`` also returns the
states from which its derivative, ``linear_scan_backward``, starts. Each backend's functions ``forward`` and ``backward`` are imported at their
first call, so that nothing here needs Triton or Numba.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ssmscan.shapes import error, state_dtype

_MODULES = {
    ("triton", "forward"): "kernel_fwd",
    ("triton", "backward"): "kernel_bwd",
    ("cpu", "forward"): "cpu",
    ("cpu", "backward"): "cpu",
}

# The number of steps between two states that the forward keeps for the backward.
SPAN = 16

_library = torch.library.Library("ssmscan", "FRAGMENT")
_INPUTS = "Tensor x, Tensor decay, Tensor? b, Tensor? c, Tensor? h0, Tensor? sequence"
_library.define(f"linear_scan({_INPUTS}, bool log, bool reverse, str backend) -> (Tensor y, Tensor h)")
_library.define(
    f"linear_scan_saving({_INPUTS}, bool log, bool reverse, str backend) -> (Tensor y, Tensor h, Tensor states)"
)
_library.define(
    f"linear_scan_backward({_INPUTS}, Tensor states, Tensor dy, Tensor? dh, bool log, bool reverse, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor da, Tensor db, Tensor dc, Tensor dh0)"
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
        return torch.ops.ssmscan.linear_scan_saving.default(*arguments)[:2]
    return torch.ops.ssmscan.linear_scan.default(*arguments)


@cache
def _function(backend: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"{__package__}.{_MODULES[backend, name]}"), name)


def _forward(*arguments):
    return _function(arguments[-1], "forward")(*arguments[:-1], False)[:2]


def _saving(*arguments):
    return _function(arguments[-1], "forward")(*arguments[:-1], True)


def _backward(*arguments):
    return _function(arguments[-1], "backward")(*arguments[:-1])


for _device in ("CPU", "CUDA"):
    _library.impl("linear_scan", _forward, _device)
    _library.impl("linear_scan_saving", _saving, _device)
    _library.impl("linear_scan_backward", _backward, _device)


@torch.library.register_fake("ssmscan::linear_scan", lib=_library)
def _fake(x, decay, b, c, h0, sequence, log, reverse, backend):
    batch, l, d = x.shape
    s = batch if h0 is None else h0.shape[0]
    return x.new_empty(batch, l, d), x.new_empty(s, d, dtype=state_dtype(x, decay, b, c, h0))


@torch.library.register_fake("ssmscan::linear_scan_saving", lib=_library)
def _(x, *arguments):
    batch, l, d = x.shape
    y, h = _fake(x, *arguments)
    return y, h, h.new_empty(batch, (l + SPAN - 1) // SPAN, d)


@torch.library.register_fake("ssmscan::linear_scan_backward", lib=_library)
def _(x, decay, b, c, h0, sequence, states, dy, dh, log, reverse, needs, backend):
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
    *gradients, dh0 = torch.ops.ssmscan.linear_scan_backward(
        x, decay, b, c, h0, sequence, states, dy, dh, ctx.log, ctx.reverse, needs, ctx.backend
    )
    dx, da, db, dc = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dx, da, db, dc, dh0.to(h0.dtype) if ctx.needs_input_grad[4] else None, None, None, None, None, None


def _refuse(ctx, *_):
    raise NotImplementedError(
        error(
            "linear_scan", 'a second derivative needs backend="torch"', f'backend="{ctx.backend}"', "Name that backend."
        )
    )


torch.library.register_autograd("ssmscan::linear_scan_saving", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd(
    "ssmscan::linear_scan_backward",
    _refuse,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "backend", inputs[-1]),
    lib=_library,
)
