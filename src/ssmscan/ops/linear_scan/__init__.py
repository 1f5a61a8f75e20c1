from ssmscan.ops.linear_scan.op import linear_scan, linear_scan_step

__all__ = ["linear_scan", "linear_scan_step"]
