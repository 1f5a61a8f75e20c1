"""State-space scans, layers, models and training for PyTorch."""

from typing import TYPE_CHECKING, Any

from ssmscan import ops
from ssmscan.ops import *  # noqa: F403 - its names are listed there, once

if TYPE_CHECKING:
    from ssmscan.models.patch import patch_transformers, unpatch_transformers

__all__ = [*ops.__all__, "patch_transformers", "unpatch_transformers"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # They belong to the models, which the operations do not import.
    if name not in ("patch_transformers", "unpatch_transformers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssmscan.models import patch

    return getattr(patch, name)
