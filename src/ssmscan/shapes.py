"""The axis legend of the library, its one error form, and the checks that the operations share.

Axes, lower case everywhere: ``b`` batch, ``l`` length, ``m`` model width, ``d`` channels, ``n`` state, ``h`` heads,
``p`` head dimension, ``g`` groups, ``r``/``c`` rows and columns of a matrix state, ``w`` convolution width,
``s`` packed sequences, ``v`` vocabulary.

Every error reads ``function: argument must <rule>, got <value>. <what to do>.`` A wrong type or dtype is a TypeError,
a wrong shape, rank or value a ValueError.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int32, torch.int64)


def error(function: str, rule: str, got: object, advice: str = "") -> str:
    """The library's error text: ``function: rule, got value. advice``."""
    return f"{function}: {rule}, got {got}.{' ' + advice if advice else ''}"


def check_integer(function: str, name: str, value: object, least: int) -> None:
    """``value`` is an integer, and neither true nor false, of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(error(function, f"{name} must be an integer", repr(value)))
    if value < least:
        raise ValueError(error(function, f"{name} must be at least {least}", value))


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and sums: float64 when any input is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def check_tensors(function: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Each given argument is a floating tensor, on the device of the first one."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                error(function, f"{name} must be a torch.Tensor", type(tensor).__name__, "Use torch.as_tensor.")
            )
        if tensor.dtype not in FLOATING:
            raise TypeError(
                error(
                    function,
                    f"{name} must be float32, bfloat16, float16 or float64",
                    tensor.dtype,
                    f"Convert it, for example {name}.float().",
                )
            )
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(
                error(function, f"{name} must be on the device of {first}, {device}", tensor.device, "Move it there.")
            )


def check_rank(function: str, name: str, tensor: Tensor, axes: str) -> None:
    """``tensor`` has one axis per name in ``axes``, as in "b, l, d"."""
    if tensor.dim() != axes.count(",") + 1:
        raise ValueError(error(function, f"{name} must have shape ({axes})", tuple(tensor.shape)))


def check_shape(
    function: str, name: str, tensor: Tensor | None, axes: str, expected: Sequence[int], matches: str
) -> None:
    """``tensor``, when given, has the shape ``expected``, whose axes are ``axes`` and which ``matches`` set."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(
            error(
                function,
                f"{name} must have shape ({axes}) = {tuple(expected)} to match {matches}",
                tuple(tensor.shape),
            )
        )


def check_state(function: str, name: str, h: Tensor, axes: str, expected: Sequence[int], dtype: torch.dtype) -> None:
    """``h`` can be updated in place: the shape ``expected``, and the dtype in which states are kept."""
    check_shape(function, name, h, axes, expected, "x")
    if h.dtype is not dtype:
        raise TypeError(error(function, f"{name} must be {dtype}, the dtype of states", h.dtype, "Convert it once."))
