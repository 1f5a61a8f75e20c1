"""State-space scans, layers, models and training for PyTorch."""

from ssmscan import ops
from ssmscan.ops import *  # noqa: F403 - its names are listed there, once

__all__ = list(ops.__all__)
__version__ = "0.1.0"
