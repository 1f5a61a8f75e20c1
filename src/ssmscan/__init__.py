"""State-space scans, layers, models and training for PyTorch."""

from ssmscan.ops import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    linear_scan,
    linear_scan_step,
    matrix_scan,
    matrix_scan_step,
    rg_lru,
    rg_lru_step,
    s4d,
    s4d_step,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_bidirectional,
    ssd_step,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_rms_norm",
    "linear_scan",
    "linear_scan_step",
    "matrix_scan",
    "matrix_scan_step",
    "rg_lru",
    "rg_lru_step",
    "s4d",
    "s4d_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_bidirectional",
    "ssd_step",
]
__version__ = "0.1.0"
