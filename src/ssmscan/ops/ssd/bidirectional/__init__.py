from ssmscan.ops.ssd.bidirectional.op import ssd_bidirectional

__all__ = ["ssd_bidirectional"]
