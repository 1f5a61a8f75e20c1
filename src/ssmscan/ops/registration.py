"""How an operation's fused implementations meet autograd and torch.library: what every ``autograd.py`` shares.

An operation says once what it takes: a NamedTuple of its tensors and one of its options, from which the schemas of its
operators are read, and functions that give the shapes of what it returns. :class:`Operator` makes of it

- an operator for inference, one that also saves what the derivative starts from (where the operation has such a thing),
  and the derivative, all registered with torch.library: what a compiler, a dispatch mode or a tensor subclass sees;
- a path that calls the launchers through :class:`torch.autograd.Function`, for eager mode, where nothing observes the
  call. The dispatcher and its autograd in Python would cost the host more than the kernels' launches.

The implementations are functions of the modules in ``MODULES``, imported at their first call, so that nothing here
needs Triton or Numba:

- ``forward(inputs, options)`` returns y, or y and the final state; where something can be saved for the derivative a
  third argument tells whether it is, and it comes last, or None;
- ``backward(inputs, [saved,] dy, [dh,] options, needs)`` returns the gradients of the differentiable inputs, each in
  its input's shape; None, or anything, where ``needs`` is False.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmscan.backend import INTERPRET
from ssmscan.shapes import PLAIN_TYPES, error, state_dtype

LIBRARY = torch.library.Library("ssmscan", "FRAGMENT")
MODULES = {
    ("triton", "forward"): "kernel_fwd",
    ("triton", "backward"): "kernel_bwd",
    ("triton", "step"): "kernel_step",
    ("cpu", "forward"): "cpu",
    ("cpu", "backward"): "cpu",
}
TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    int: "SymInt",
    torch.dtype: "ScalarType",
}


class Operator:
    """An operation on its fused backends: called with its inputs, its options and the name of the backend.

    Args:
        name: the operation's.
        inputs: NamedTuple of the tensors that it takes; its module lies in the package of the implementations.
        options: NamedTuple of the rest.
        outputs: from both, empty tensors like y and the final state, or like y alone where there is no state.
        saved: from both and the final state, an empty tensor like the one that the forward saves; None saves nothing.
        constants: how many inputs, the last ones, have no derivative.
        state: whether a final state is returned.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Any],
        options: type[Any],
        outputs: Callable[[Any, Any], Any],
        saved: Callable[[Any, Any, Tensor], Tensor] | None = None,
        constants: int = 0,
        state: bool = True,
    ) -> None:
        self.name, self.inputs, self.options = name, inputs, options
        self.outputs, self.saved = outputs, saved
        self.count = len(inputs._fields)
        self.differentiable = self.count - constants
        self.load = loader(inputs.__module__.rpartition(".")[0])

        tensors, rest = parameters(inputs), parameters(options)
        results = ["Tensor y", "Tensor h"] if state else ["Tensor y"]
        extra = [] if saved is None else ["Tensor saved"]
        cotangents = ["Tensor dy", "Tensor? dh"] if state else ["Tensor dy"]
        gradients = [f"Tensor d{field}" for field in inputs._fields[: self.differentiable]]
        self.forward = define(name, [*tensors, *rest, "str backend"], results, self._forward, self._fake_forward)
        # What is differentiated.
        self.saving = self.forward
        if saved is not None:
            self.saving = define(
                f"{name}_saving", [*tensors, *rest, "str backend"], results + extra, self._saving, self._fake_saving
            )
        self.backward = define(
            f"{name}_backward",
            [*tensors, *extra, *cotangents, *rest, "bool[] needs", "str backend"],
            gradients,
            self._backward,
            self._fake_backward,
        )
        for operator, setup, backward in (
            (self.saving, self._remember, self._differentiate),
            (self.backward, self._remember_backend, self._refuse_second),
        ):
            torch.library.register_autograd(operator, backward, setup_context=setup, lib=LIBRARY)

    def __call__(self, inputs: Any, options: Any, backend: str) -> Any:
        seen = observed(inputs)
        if not seen:
            self._refuse_transforms(inputs, backend)
        # The tracer repeats the call without gradients, and wants the same operator.
        traced = seen and torch._C._get_tracing_state() is not None
        if traced or needs_grad(*inputs[: self.differentiable]):
            if not seen:
                return _Eager.apply(self, options, backend, *inputs)
            results = self.saving(*inputs, *options, backend)
            return results if self.saved is None else results[:-1]
        return self.forward(*inputs, *options, backend) if seen else self._infer(inputs, options, backend)

    def _infer(self, inputs: Any, options: Any, backend: str) -> Any:
        results = self.load(backend, "forward")(inputs, options)
        return results if self.saved is None else results[:-1]

    def gradients(
        self,
        tensors: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
        options: Any,
        needs: Sequence[bool],
        backend: str,
        **hooks: Any,
    ) -> list[Tensor | None]:
        """The gradients of the differentiable inputs; ``tensors`` are all inputs and what was saved.

        ``hooks`` are for the implementation; no operator takes them.
        """
        x, dy = tensors[0], cotangents[0]
        assert x is not None
        cotangents = (torch.zeros_like(x) if dy is None else dy, *cotangents[1:])
        # Grad mode is on in a backward that is to be differentiated itself.
        if not hooks and (torch.is_grad_enabled() or observed((*tensors, *cotangents))):
            found = self.backward(*tensors, *cotangents, *options, list(needs), backend)
        else:
            inputs, between = self.inputs._make(tensors[: self.count]), (*tensors[self.count :], *cotangents)
            found = self.load(backend, "backward")(inputs, *between, options, needs, **hooks)
        return [
            _like(tensor, gradient) if need else None
            for tensor, gradient, need in zip(tensors[: self.differentiable], found, needs, strict=True)
        ]

    # The functions of the registered operators, and of their derivatives: they take everything flat.

    def _split(self, arguments: tuple) -> tuple[Any, tuple, Any]:
        """The inputs, what stands between, and the options, of arguments that end with the options."""
        last = len(arguments) - len(self.options._fields)
        return (
            self.inputs._make(arguments[: self.count]),
            arguments[self.count : last],
            self.options._make(arguments[last:]),
        )

    def _forward(self, *arguments):
        inputs, _, options = self._split(arguments[:-1])
        return self._infer(inputs, options, arguments[-1])

    def _saving(self, *arguments):
        inputs, _, options = self._split(arguments[:-1])
        return self.load(arguments[-1], "forward")(inputs, options, True)

    def _backward(self, *arguments):
        needs, backend = tuple(arguments[-2]), arguments[-1]
        inputs, between, options = self._split(arguments[:-2])
        found = self.load(backend, "backward")(inputs, *between, options, needs)
        # An operator returns tensors: empty ones where nothing is wanted.
        return tuple(
            _like(tensor, gradient) if need and gradient is not None else inputs[0].new_empty(0)
            for tensor, gradient, need in zip(inputs[: self.differentiable], found, needs, strict=True)
        )

    def _fake_forward(self, *arguments):
        inputs, _, options = self._split(arguments[:-1])
        return self.outputs(inputs, options)

    def _fake_saving(self, *arguments):
        inputs, _, options = self._split(arguments[:-1])
        y, h = self.outputs(inputs, options)
        assert self.saved is not None
        return y, h, self.saved(inputs, options, h)

    def _fake_backward(self, *arguments):
        needs, x = arguments[-2], arguments[0]
        return tuple(
            tensor.new_empty(tensor.shape) if need and tensor is not None else x.new_empty(0)
            for tensor, need in zip(arguments[: self.differentiable], needs, strict=True)
        )

    def _remember(self, ctx, inputs, output):
        tensors, _, ctx.options = self._split(inputs[:-1])
        ctx.backend = inputs[-1]
        ctx.save_for_backward(*tensors, *(() if self.saved is None else output[-1:]))
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx, *cotangents):
        if self.saved is not None:
            cotangents = cotangents[:-1]
        needs = ctx.needs_input_grad[: self.differentiable]
        gradients = self.gradients(ctx.saved_tensors, cotangents, ctx.options, needs, ctx.backend)
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - self.differentiable)

    def _remember_backend(self, ctx, inputs, output):
        ctx.backend = inputs[-1]

    def _refuse_second(self, ctx, *_):
        raise NotImplementedError(self._only_torch("a second derivative", ctx.backend))

    def _refuse_transforms(self, inputs: Sequence[Tensor | None], backend: str) -> None:
        """Neither the kernels nor their derivatives see the tangents and batches that such tensors carry."""
        if torch._C._are_functorch_transforms_active():
            if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in inputs):
                raise NotImplementedError(self._only_torch("a transform of torch.func", backend))
        elif forward_ad._current_level >= 0 and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs
        ):
            raise NotImplementedError(self._only_torch("a forward-mode derivative", backend))

    def _only_torch(self, what: str, backend: str) -> str:
        return error(self.name, f'{what} needs backend="torch"', f'backend="{backend}"', "Name that backend.")


class _Eager(torch.autograd.Function):
    """An operation whose call nothing observes."""

    @staticmethod
    def forward(ctx, operator, options, backend, *inputs):
        given = operator.inputs._make(inputs)
        function = operator.load(backend, "forward")
        if operator.saved is None:
            results = function(given, options)
            ctx.save_for_backward(*inputs)
        else:
            *results, saved = function(given, options, True)
            ctx.save_for_backward(*inputs, saved)
        ctx.operator, ctx.options, ctx.backend = operator, options, backend
        ctx.set_materialize_grads(False)
        return results if isinstance(results, Tensor) else tuple(results)

    @staticmethod
    def backward(ctx, *cotangents):
        operator = ctx.operator
        needs = ctx.needs_input_grad[3 : 3 + operator.differentiable]
        gradients = operator.gradients(ctx.saved_tensors, cotangents, ctx.options, needs, ctx.backend)
        return None, None, None, *gradients, *(None,) * (operator.count - operator.differentiable)


def _like(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient in its tensor's dtype: that of a state comes in float32."""
    if gradient is None or tensor is None or gradient.dtype is tensor.dtype:
        return gradient
    return gradient.to(tensor.dtype)


def like_x(inputs: Any, options: Any) -> tuple[Tensor, Tensor]:
    """The ``outputs`` of an operation whose state is a token of x; its last inputs are h0 and the packed sequences."""
    x, h0 = inputs.x, inputs.h0
    s = x.shape[0] if h0 is None else h0.shape[0]
    return x.new_empty(x.shape), x.new_empty(s, *x.shape[2:], dtype=state_dtype(*inputs[:-1]))


def states_every(span: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """What such an operation has ``saved``: the state before every so many steps."""

    def saved(inputs: Any, options: Any, h: Tensor) -> Tensor:
        batch, l = inputs.x.shape[:2]
        return h.new_empty(batch, (l + span - 1) // span, *inputs.x.shape[2:])

    return saved


def loader(package: str) -> Callable[[str, str], Callable[..., Any]]:
    """``load(backend, name)``: the function ``name`` of the module of ``package`` that ``MODULES`` gives for both."""

    @cache
    def load(backend: str, name: str) -> Callable[..., Any]:
        function = getattr(import_module(f"{package}.{MODULES[backend, name]}"), name)
        if backend != "triton" or name == "step" or INTERPRET:
            return function
        from ssmscan.ops._triton.record import Recorded

        return Recorded(function)

    return load


def parameters(fields: type[Any]) -> list[str]:
    """The fields of a NamedTuple, as a schema declares them."""
    return [f"{TYPES[kind]} {name}" for name, kind in fields.__annotations__.items()]


def define(
    name: str, arguments: list[str], results: list[str], function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Define an operator whose ``function`` runs on the CPU and on CUDA, and whose ``fake`` gives the shapes."""

    def run(*arguments):
        # The shapes of a call that is traced are tensors, unless the tracer looks away.
        tracing = torch._C._get_tracing_state()
        if tracing is None:
            return function(*arguments)
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return function(*arguments)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]

    returned = f"({', '.join(results)})" if len(results) > 1 else results[0]
    LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returned}")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"ssmscan::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.ssmscan, name).default


def define_step(schema: str, package: str) -> Callable[..., Tensor]:
    """Define the operator of a decode step, y in the shape of its first argument, and return what calls it.

    It is one launch of the Triton kernel ``step`` of ``package``, and has no derivative; :mod:`ssmscan.ops.decoding`
    says when it is taken.
    """
    load = loader(package)

    def launch(*arguments):
        return load("triton", "step")(*arguments)

    name, _, rest = schema.partition("(")
    operator = define(name, rest.removesuffix(") -> Tensor").split(", "), ["Tensor"], launch, _like_first)

    def step(*arguments):
        return operator(*arguments) if observed(arguments[:1]) else launch(*arguments)

    return step


def _like_first(x, *_):
    return x.new_empty(x.shape)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a derivative of this call.

    Not of an exported program: what the forward saves for the backward would tie that to the lengths of its example.
    """
    # The function is_exporting() is True in any compilation by PyTorch 2.11.
    if torch.is_grad_enabled() and not torch.compiler._is_exporting_flag:
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative may be at work, of which no kernel knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a tensor subclass has to see the operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return True
    return torch._C._get_tracing_state() is not None
