"""Mamba-2's scan. Not exported yet: the conformance suite has not run over it in full, nor its kernels on a GPU."""

from ssmscan.ops.ssd.op import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
