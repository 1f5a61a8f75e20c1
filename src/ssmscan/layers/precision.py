"""Parameters that keep float32 whatever the rest of the model is converted to."""

from collections.abc import Callable

from torch import Tensor, nn


def keep_wide(convert: Callable[[Tensor], Tensor], *parameters: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """``convert``, as :meth:`torch.nn.Module._apply` takes it, but moving ``parameters`` without narrowing them.

    So ``layer.bfloat16()`` or ``layer.half()`` leaves a decay bias in float32: its updates are far smaller than
    bfloat16 can add.
    """
    kept = {id(tensor) for p in parameters for tensor in (p, p.grad) if tensor is not None}

    def move(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        if id(tensor) in kept and converted.dtype.itemsize < tensor.dtype.itemsize:
            return tensor.to(converted.device)
        return converted

    return move
