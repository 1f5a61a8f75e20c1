"""The weights that a model starts from, which leave alone what a checkpoint gave."""

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def draw(module: nn.Module, reset: Callable[[], object] | None = None) -> None:
    """Draw the parameters of ``module``, once, and give back those that were loaded.

    ``reset`` draws them; None is the module's ``reset_parameters``.

    transformers marks what it loaded, and modules that are done, with ``_is_hf_initialized``. Its own functions skip
    marked tensors one by one; here a layer draws as it does without transformers, whatever it draws with.
    """
    if getattr(module, "_is_hf_initialized", False):
        return
    parameters = list(module.parameters())
    loaded = [tensor for tensor in parameters if getattr(tensor, "_is_hf_initialized", False)]
    if len(loaded) < len(parameters):
        values = [tensor.clone() for tensor in loaded]
        (reset or module.reset_parameters)()  # type: ignore[operator]
        for tensor, value in zip(loaded, values, strict=True):
            tensor.copy_(value)
    module._is_hf_initialized = True  # type: ignore[assignment]


def wide_patterns(model: nn.Module) -> set[str]:
    """Patterns for the names of parameters that stay float32, as transformers takes them."""
    patterns = set()
    for path, module in model.named_modules():
        for name in getattr(module, "_keep_wide", ()):
            # One pattern for all layers.
            parts = [r"\d+" if part.isdigit() else part for part in (*path.split("."), name)]
            patterns.add(r"\.".join(parts[-3:]) + "$")
    return patterns
