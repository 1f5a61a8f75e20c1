from ssmscan.ops.gated_rms_norm.op import gated_rms_norm

__all__ = ["gated_rms_norm"]
