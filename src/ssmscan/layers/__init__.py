"""Layers: modules that read ``y = layer(x, state=None, cu_seqlens=None)``."""

from ssmscan.layers.gated_ssm import GatedSSM, GatedSSMState
from ssmscan.layers.norm import RMSNorm

__all__ = ["GatedSSM", "GatedSSMState", "RMSNorm"]
