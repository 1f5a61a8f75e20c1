"""State-space scans, layers, models and training for PyTorch."""

from ssmscan.ops import linear_scan, linear_scan_step

__all__ = ["linear_scan", "linear_scan_step"]
__version__ = "0.1.0"
