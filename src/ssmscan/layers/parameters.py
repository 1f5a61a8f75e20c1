"""Parameters by name: which stay float32 whatever a module is converted to, and which are not weight-decayed."""

from typing import Any

import torch
from torch import Tensor, nn


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` (None is PyTorch's default), but float32 at least."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class WideParameters(nn.Module):
    """A module that names parameters to keep in float32 or wider, and parameters without weight decay.

    The first keep their width through ``.bfloat16()``, ``.half()``, ``.to(dtype)`` and ``load_state_dict``, with
    ``assign=True`` too: the updates of a rate of decay are far smaller than bfloat16 can add. Names stand in the class,
    so that they survive copies, pickles, the meta device and other libraries' ways of loading.
    """

    _keep_wide: tuple[str, ...] = ()
    _no_weight_decay: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        parameters = [p for name in self._keep_wide if (p := self._parameters.get(name)) is not None]
        kept = {id(tensor) for p in parameters for tensor in (p, p.grad) if tensor is not None}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept and wide(converted.dtype) is not converted.dtype:
                return tensor.to(converted.device, torch.float32)
            return converted

        return super()._apply(convert, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in self._keep_wide:
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor):
                state_dict[prefix + name] = given.to(wide(given.dtype))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that are weight-decayed, and those that are not.

    Vectors (biases, scales of norms, step sizes) and the parameters that a layer names in ``_no_weight_decay`` (its
    rates of decay) are not; matrices, convolutions and embeddings are. A parameter that two modules share comes once.

    Args:
        module: any module.

    Returns:
        Two lists of parameters, in the order of ``module.parameters()``.

    The split is that of the Mamba papers; see Gu and Dao, "Mamba" (2023), appendix E.2.

    Example:
        >>> from ssmscan.layers import GatedSSM, decay_groups
        >>> decayed, kept = decay_groups(GatedSSM(4))
        >>> [tuple(p.shape) for p in decayed], [tuple(p.shape) for p in kept]
        ([(64, 4), (4, 16)], [(16,), (16,)])
    """
    named = {
        id(p)
        for part in module.modules()
        for name, p in part.named_parameters(recurse=False)
        if name in getattr(part, "_no_weight_decay", ())
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for p in module.parameters():
        if p.requires_grad:
            (kept if p.dim() < 2 or id(p) in named else decayed).append(p)
    return decayed, kept
