from ssmscan.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssmscan.ops.gated_rms_norm import gated_rms_norm
from ssmscan.ops.linear_scan import linear_scan, linear_scan_step
from ssmscan.ops.matrix_scan import matrix_scan, matrix_scan_step
from ssmscan.ops.rg_lru import rg_lru, rg_lru_step
from ssmscan.ops.s4d import s4d, s4d_lin, s4d_real, s4d_step
from ssmscan.ops.selective_scan import selective_scan, selective_scan_step
from ssmscan.ops.ssd import ssd, ssd_step
from ssmscan.ops.ssd.bidirectional import ssd_bidirectional

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
    "s4d_lin",
    "s4d_real",
    "s4d_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_bidirectional",
    "ssd_step",
]
