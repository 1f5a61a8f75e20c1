from ssmscan.ops.matrix_scan.op import matrix_scan, matrix_scan_step

__all__ = ["matrix_scan", "matrix_scan_step"]
