"""Tensor parallelism: how each kind of layer is split over its heads or channels.

A split mixer is a smaller mixer: with the sizes and parameters of a rank its forward is the same code. Its first
projection takes what all ranks have, its last one makes a summand of what all get.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ssmscan.distributed.norm import SplitGatedRMSNorm
from ssmscan.distributed.splitter import Layer, Piece, Splitter
from ssmscan.distributed.vocabulary import SplitVocabulary
from ssmscan.layers import MLP, RGLRU, Attention, GatedRMSNorm, GatedSSM, Mamba, Mamba2, MatrixSSM
from ssmscan.layers.conv import ShortConv
from ssmscan.layers.mixer import Mixer
from ssmscan.shapes import error


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the mixers, MLPs, embedding and head of ``model`` over the ranks of ``mesh``; the rest all have whole."""
    splitter = Splitter(mesh)
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, (Mixer, MLP)):
            if type(module) not in _FORMS:
                known = ", ".join(kind.__name__ for kind in _FORMS)
                advice = 'Give the mesh "dp" or "cp" instead.'
                rule = f'layers must be of {known} on a mesh with "tp"'
                raise NotImplementedError(error("parallelize", rule, type(module).__name__, advice))
            _FORMS[type(module)](splitter, module)
        elif isinstance(module, nn.Embedding) and module.num_embeddings % splitter.ranks == 0:
            splitter.embedding(module)
            head = getattr(model, "lm_head", None)
            if head is not None:
                splitter.head(head)
                own = head.out_features // splitter.ranks
                model.vocabulary = SplitVocabulary(mesh, own)  # type: ignore[assignment]
    splitter.keep(model)
    for module in modules:
        if isinstance(module, (Mixer, MLP)):
            Layer(module)


def _gated_ssm(splitter: Splitter, mixer: GatedSSM) -> None:
    splitter.columns(mixer.in_proj, *[Piece(mixer.d_inner)] * 4)
    splitter.parameters(mixer, "decay_bias", "input_bias")
    splitter.rows(mixer.out_proj)
    splitter.part(mixer, "d_inner")


def _matrix_ssm(splitter: Splitter, mixer: MatrixSSM) -> None:
    splitter.check("heads", mixer, mixer.nheads)
    splitter.columns(mixer.in_proj, *[Piece(mixer.d_inner)] * 2, *[Piece(mixer.rows)] * 3)
    splitter.parameters(mixer, "decay_bias")
    splitter.parameters(mixer.norm, "weight")
    splitter.rows(mixer.out_proj)
    splitter.part(mixer, "nheads", "d_inner", "rows")


def _mamba(splitter: Splitter, mixer: Mamba) -> None:
    splitter.columns(mixer.in_proj, *[Piece(mixer.d_inner)] * 2)
    _conv(splitter, mixer.conv1d, Piece(mixer.d_inner))
    splitter.rows(mixer.x_proj, then_split=True)
    splitter.parameters(mixer.dt_proj, "weight", "bias")
    splitter.parameters(mixer, "A_log", "D")
    splitter.rows(mixer.out_proj)
    splitter.part(mixer, "d_inner")


def _mamba2(splitter: Splitter, mixer: Mamba2) -> None:
    splitter.check("heads", mixer, mixer.nheads)
    pair, groups = _shared(splitter, mixer.nheads, mixer.ngroups, mixer.d_state)
    splitter.columns(mixer.in_proj, *[Piece(mixer.d_inner)] * 2, pair, pair, Piece(mixer.nheads))
    _conv(splitter, mixer.conv1d, Piece(mixer.d_inner), pair, pair)
    splitter.parameters(mixer, "dt_bias", "A_log", "D")
    mixer.norm = _norm(splitter, mixer.norm)
    splitter.rows(mixer.out_proj, project=getattr(mixer.norm, "project", None))
    splitter.part(mixer, "nheads", "d_inner")
    mixer.ngroups, mixer.pair_width = groups, 2 * groups * mixer.d_state


def _rg_lru(splitter: Splitter, mixer: RGLRU) -> None:
    splitter.check("heads", mixer, mixer.input_gate.bias.shape[0])
    splitter.columns(mixer.in_proj, *[Piece(mixer.d_inner)] * 2)
    _conv(splitter, mixer.conv1d, Piece(mixer.d_inner))
    for gate in (mixer.input_gate, mixer.recurrence_gate):
        splitter.parameters(gate, "weight", "bias")
    splitter.parameters(mixer, "a_param")
    splitter.rows(mixer.out_proj)
    splitter.part(mixer, "d_inner")


def _attention(splitter: Splitter, mixer: Attention) -> None:
    splitter.check("heads", mixer, mixer.num_heads)
    pair, groups = _shared(splitter, mixer.num_heads, mixer.num_heads_kv, mixer.head_dim)
    pieces = Piece(mixer.num_heads * mixer.head_dim), pair, pair
    splitter.columns(mixer.in_proj, *pieces)
    if mixer.conv1d is not None:
        _conv(splitter, mixer.conv1d, *pieces)
    splitter.rows(mixer.out_proj)
    splitter.part(mixer, "num_heads")
    mixer.num_heads_kv = groups
    mixer.rows = (mixer.num_heads + 2 * groups) * mixer.head_dim


def _mlp(splitter: Splitter, mlp: MLP) -> None:
    splitter.columns(mlp.fc1, *[Piece(mlp.fc2.in_features)] * 2)
    splitter.rows(mlp.fc2)


_FORMS: dict[type, Callable[[Splitter, Any], None]] = {
    GatedSSM: _gated_ssm,
    MatrixSSM: _matrix_ssm,
    Mamba: _mamba,
    Mamba2: _mamba2,
    RGLRU: _rg_lru,
    Attention: _attention,
    MLP: _mlp,
}


def _conv(splitter: Splitter, conv: ShortConv, *pieces: Piece) -> None:
    for name in ("weight", "bias"):
        splitter.parameter(conv, name, pieces)
    conv.out_channels = conv.weight.shape[0]


def _shared(splitter: Splitter, heads: int, groups: int, width: int) -> tuple[Piece, int]:
    """What a rank has of ``width`` rows for each of the groups that its heads are in, and how many groups that makes.

    Groups that cannot be shared out are on every rank, which takes those of its heads.
    """
    if groups % splitter.ranks == 0:
        return Piece(groups * width), groups // splitter.ranks
    here = heads // splitter.ranks
    own = [head * groups // heads for head in range(splitter.rank * here, (splitter.rank + 1) * here)]
    distinct = sorted(set(own))
    # As many heads in each; where that is not so, each head has a group of its own.
    if len({own.count(group) for group in distinct}) == 1:
        own = distinct
    if own == list(range(groups)):
        return Piece(groups * width, split=False), groups
    rows = torch.tensor([group * width + i for group in own for i in range(width)], device=splitter.mesh.device_type)
    return Piece(groups * width, split=False, rows=rows), len(own)


def _norm(splitter: Splitter, norm: GatedRMSNorm) -> GatedRMSNorm:
    """The norm of a rank's channels, whose groups are whole there or shared by the ranks."""
    groups = norm.weight.shape[0] // norm.group_size
    if groups % splitter.ranks:
        if splitter.ranks % groups:
            rule = f"the {groups} groups of a gated norm must divide the {splitter.ranks} ranks of tp, or they them"
            raise NotImplementedError(error("parallelize", rule, "neither"))
        norm = SplitGatedRMSNorm(norm, splitter.mesh)
    splitter.parameters(norm, "weight")
    return norm
