"""Layers: modules that read ``y = layer(x, state=None, cu_seqlens=None, mask=None)``."""

from ssmscan.layers.attention import Attention, AttentionState
from ssmscan.layers.block import Block
from ssmscan.layers.gated_ssm import GatedSSM, GatedSSMState
from ssmscan.layers.hydra import Hydra
from ssmscan.layers.mamba import Mamba, MambaState
from ssmscan.layers.mamba2 import Mamba2, Mamba2State
from ssmscan.layers.matrix_ssm import MatrixSSM, MatrixSSMState
from ssmscan.layers.mixer import Mixer
from ssmscan.layers.mlp import MLP
from ssmscan.layers.norm import GatedRMSNorm, RMSNorm
from ssmscan.layers.parameters import decay_groups
from ssmscan.layers.rg_lru import RGLRU, RGLRUState
from ssmscan.layers.s4d import S4D, S4DState
from ssmscan.layers.state import copy, reorder, restore

__all__ = [
    "MLP",
    "RGLRU",
    "S4D",
    "Attention",
    "AttentionState",
    "Block",
    "GatedRMSNorm",
    "GatedSSM",
    "GatedSSMState",
    "Hydra",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "MatrixSSM",
    "MatrixSSMState",
    "Mixer",
    "RGLRUState",
    "RMSNorm",
    "S4DState",
    "copy",
    "decay_groups",
    "reorder",
    "restore",
]
