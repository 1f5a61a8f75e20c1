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
# Tensors of these types are what they seem; another may hide a compiler, many devices or no values.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_STRIDED, _WIDEST = torch.strided, torch.float64


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
        if tensor is not None and tensor.dtype is _WIDEST:
            return _WIDEST
    return torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of x before a product: float64 stays."""
    if x.dtype is _WIDEST or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def check_tensors(function: str, required: Mapping[str, Tensor | None], **optional: Tensor | None) -> None:
    """Each of ``required``, and of ``optional`` what is not None, is a dense floating tensor, all on one device."""
    first = device = None
    for tensors, needed in ((required, True), (optional, False)):
        for name, tensor in tensors.items():
            if tensor is None:
                if needed:
                    check_dense(function, name, tensor)
                continue
            if (
                type(tensor) not in PLAIN_TYPES
                or tensor.dtype not in FLOATING
                or tensor.layout is not _STRIDED
                or tensor.is_nested
            ):
                check_dense(function, name, tensor)
                if tensor.dtype not in FLOATING:
                    rule = f"{name} must be float32, bfloat16, float16 or float64"
                    raise TypeError(error(function, rule, tensor.dtype, f"Convert it, for example {name}.float()."))
            if device is None:
                first, device = name, tensor.device
            elif tensor.device != device:
                rule = f"{name} must be on the device of {first}, {device}"
                raise ValueError(error(function, rule, tensor.device, "Move it there."))


def check_dense(function: str, name: str, tensor: object) -> None:
    """All of ``tensor`` lies in the memory of this process, at strides: it is not sparse, nested or distributed."""
    if not isinstance(tensor, Tensor):
        rule = f"{name} must be a torch.Tensor"
        raise TypeError(error(function, rule, type(tensor).__name__, "Use torch.as_tensor."))
    if tensor.is_nested:
        got, advice = "a nested tensor", "Concatenate the sequences along the length, with cu_seqlens."
    elif tensor.layout is not _STRIDED:
        got, advice = str(tensor.layout), f"Use {name}.to_dense()."
    elif hasattr(tensor, "device_mesh"):
        got, advice = type(tensor).__name__, f"Use {name}.to_local()."
    else:
        return
    raise TypeError(error(function, f"{name} must be a dense tensor", got, advice))


def check_flags(function: str, **flags: bool) -> None:
    """Each is True or False, and nothing that only counts as one of them."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(error(function, f"{name} must be True or False", repr(value)))


def check_rank(function: str, name: str, tensor: Tensor, axes: str, advice: str = "") -> None:
    """``tensor`` has one axis per name in ``axes``, as in "b, l, d"."""
    if tensor.dim() != axes.count(",") + 1:
        raise ValueError(error(function, f"{name} must have shape ({axes})", tuple(tensor.shape), advice))


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
