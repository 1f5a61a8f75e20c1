from ssmscan.ops.ssd.op import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
