"""Every operation's case, for the tests and the benchmarks."""

from ssmscan.ops.causal_conv1d.case import CASE as CAUSAL_CONV1D
from ssmscan.ops.gated_rms_norm.case import CASE as GATED_RMS_NORM
from ssmscan.ops.linear_scan.case import CASE as LINEAR_SCAN
from ssmscan.ops.matrix_scan.case import CASE as MATRIX_SCAN
from ssmscan.ops.rg_lru.case import CASE as RG_LRU
from ssmscan.ops.s4d.case import CASE as S4D
from ssmscan.ops.selective_scan.case import CASE as SELECTIVE_SCAN
from ssmscan.ops.ssd.bidirectional.case import CASE as SSD_BIDIRECTIONAL
from ssmscan.ops.ssd.case import CASE as SSD

CASES = (CAUSAL_CONV1D, GATED_RMS_NORM, LINEAR_SCAN, MATRIX_SCAN, RG_LRU, S4D, SELECTIVE_SCAN, SSD, SSD_BIDIRECTIONAL)
