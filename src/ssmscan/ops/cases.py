"""Every operation's case, for the tests and the benchmarks."""

from ssmscan.ops.linear_scan.case import CASE as LINEAR_SCAN

CASES = (LINEAR_SCAN,)
