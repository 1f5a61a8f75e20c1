"""Registering an operation's fused implementations with torch.library: what every ``autograd.py`` shares.

An operation has an operator for inference (no derivative, least work on the host), one that also saves what its
derivative starts from, and the derivative itself. The last argument of each is the name of the backend, whose
functions are imported at their first call, so that nothing here needs Triton or Numba.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ssmscan.shapes import error

LIBRARY = torch.library.Library("ssmscan", "FRAGMENT")


def loader(package: str, modules: Mapping[tuple[str, str], str]) -> Callable[[str, str], Callable[..., Any]]:
    """``load(backend, name)``: the function ``name`` of the module that ``modules`` gives for the two."""

    @cache
    def load(backend: str, name: str) -> Callable[..., Any]:
        return getattr(import_module(f"{package}.{modules[backend, name]}"), name)

    return load


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator whose ``function`` runs on the CPU and on CUDA, and whose ``fake`` gives the shapes."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"ssmscan::{name}", fake, lib=LIBRARY)


def define_step(schema: str, load: Callable[[str, str], Callable[..., Any]]) -> Callable[..., Tensor]:
    """Define the operator of a decode step, y in the shape of its first argument, and return what calls it.

    It is one launch of the Triton kernel that ``load`` finds, and has no derivative; :mod:`ssmscan.ops.decoding` says
    when it is taken.
    """

    def launch(*arguments):
        return load("triton", "step")(*arguments)

    define(schema, launch, lambda x, *_: x.new_empty(x.shape))
    operator = getattr(torch.ops.ssmscan, schema[: schema.index("(")]).default

    def step(*arguments):
        return operator(*arguments) if observed(arguments[0]) else launch(*arguments)

    return step


def differentiate(name: str, setup: Callable[..., None], backward: Callable[..., Any], derivative: str) -> None:
    """Give the operator ``name`` its ``backward``, which calls the operator ``derivative``; that has none itself."""
    torch.library.register_autograd(f"ssmscan::{name}", backward, setup_context=setup, lib=LIBRARY)

    def remember(ctx, inputs, output):
        ctx.backend = inputs[-1]

    def refuse(ctx, *_):
        function = derivative.removesuffix("_backward")
        rule = 'a second derivative needs backend="torch"'
        raise NotImplementedError(error(function, rule, f'backend="{ctx.backend}"', "Name that backend."))

    torch.library.register_autograd(f"ssmscan::{derivative}", refuse, setup_context=remember, lib=LIBRARY)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a derivative of this call.

    Not of an exported program: what the forward saves for the backward would tie that to the lengths of its example.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def observed(x: Tensor) -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a subclass has to see the operator; else it can be spared.

    It costs more on the host than a kernel's launch.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
