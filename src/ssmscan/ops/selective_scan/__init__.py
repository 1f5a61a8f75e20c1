from ssmscan.ops.selective_scan.op import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
