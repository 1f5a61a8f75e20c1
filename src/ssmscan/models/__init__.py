"""Models: embedding, blocks, norm, head; transformers is imported when one of its names is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmscan.models.cache import SSMCache
    from ssmscan.models.checkpoints.load import load_pretrained
    from ssmscan.models.configuration import SSMConfig
    from ssmscan.models.modeling import SSMForCausalLM, SSMModel
    from ssmscan.models.presets import PRESETS, preset

_HOMES = {
    "PRESETS": "presets",
    "SSMCache": "cache",
    "SSMConfig": "configuration",
    "SSMForCausalLM": "modeling",
    "SSMModel": "modeling",
    "load_pretrained": "checkpoints.load",
    "preset": "presets",
}

__all__ = [
    "PRESETS",
    "SSMCache",
    "SSMConfig",
    "SSMForCausalLM",
    "SSMModel",
    "load_pretrained",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
