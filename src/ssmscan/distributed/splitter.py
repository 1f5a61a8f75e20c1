"""Splitter: parameters of a module split over the ranks of tensor parallelism, piece by piece."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ssmscan.distributed.collectives import copy, join, total
from ssmscan.shapes import error


class Piece(NamedTuple):
    """Consecutive rows of a parameter, and what a rank has of them."""

    size: int
    # Each rank has its part of them. Otherwise all have all of them, and the gradient is the sum of the ranks'.
    split: bool = True
    # Those of a piece that is not split which this rank computes with, in this order; None is all.
    rows: Tensor | None = None
    # Only the first rank computes with them, and the others with zeros: a summand of what is summed over the ranks.
    once: bool = False


class Local(nn.Module):
    """What a rank computes with of a parameter whose pieces, each a DTensor, are kept in its place.

    A parametrization, as :mod:`torch.nn.utils.parametrize` has them: the module that the parameter belongs to sees the
    local tensor under its name.

    Args:
        mesh: the ranks.
        dim: the axis that is cut into pieces.
        pieces: what is done with each; None keeps the parameter whole, where all ranks do the same with it.
    """

    def __init__(self, mesh: DeviceMesh, dim: int, pieces: Sequence[Piece] | None) -> None:
        super().__init__()
        self.mesh, self.dim, self.pieces = mesh, dim, pieces

    def right_inverse(self, whole: Tensor) -> list[DTensor]:
        """The pieces of a parameter that every rank has."""
        if self.pieces is None:
            return [DTensor.from_local(whole.clone(), self.mesh, [Replicate()], run_check=False)]
        made = []
        for part, piece in zip(whole.split([piece.size for piece in self.pieces], self.dim), self.pieces, strict=True):
            own = part.chunk(self.mesh.size(), self.dim)[self.mesh.get_local_rank()] if piece.split else part
            placement = Shard(self.dim) if piece.split else Replicate()
            made.append(DTensor.from_local(own.clone(), self.mesh, [placement], run_check=False))
        return made

    @torch.compiler.disable
    def forward(self, *pieces: DTensor) -> Tensor:
        local = [piece.to_local() for piece in pieces]
        if self.pieces is None:
            return local[0]
        for i, piece in enumerate(self.pieces):
            if not piece.split:
                local[i] = copy(local[i], self.mesh.get_group())
                if piece.rows is not None:
                    local[i] = local[i].index_select(self.dim, piece.rows)
                if piece.once and self.mesh.get_local_rank() > 0:
                    local[i] = local[i] * 0
        return local[0] if len(local) == 1 else torch.cat(local, self.dim)


class Splitter:
    """Splits modules over the ranks of a mesh of one dimension, "tp".

    It knows the whole parameters, so nothing that it leaves in a module may know it.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        # By the parameter that it was made from, for a model's head and embedding may share theirs.
        self.made: dict[nn.Parameter, ParametrizationList] = {}

    def check(self, what: str, module: nn.Module, count: int) -> None:
        """Refuse what cannot be shared out to the ranks."""
        if count % self.ranks:
            rule = f"the {what} of {type(module).__name__} must be a multiple of the {self.ranks} ranks of tp"
            raise ValueError(error("parallelize", rule, count))

    def part(self, module: nn.Module, *sizes: str) -> None:
        """Make sizes of a module those of a rank."""
        for size in sizes:
            setattr(module, size, getattr(module, size) // self.ranks)

    def parameter(self, module: nn.Module, name: str, pieces: Sequence[Piece] | None, dim: int = 0) -> None:
        """Keep a parameter in pieces, of which the module sees what is this rank's."""
        whole = module._parameters.get(name)
        if whole is None:
            return
        for piece in pieces or ():
            if piece.split:
                self.check(f"rows or columns of {name}", module, piece.size)
        parametrize.register_parametrization(module, name, Local(self.mesh, dim, pieces), unsafe=True)
        made = cast(ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[name])
        made.requires_grad_(whole.requires_grad)
        names = [original for original, _ in made.named_parameters()]
        if whole in self.made:
            for original in names:
                setattr(made, original, getattr(self.made[whole], original))
        self.made[whole] = made
        if name in getattr(module, "_no_weight_decay", ()):
            made._no_weight_decay = tuple(names)  # type: ignore[assignment]

    def parameters(self, module: nn.Module, *names: str) -> None:
        """Split parameters along their first axis."""
        for name in names:
            whole = module._parameters.get(name)
            if whole is not None:
                self.parameter(module, name, [Piece(whole.shape[0])])

    def keep(self, model: nn.Module) -> None:
        """Keep what is not split whole on every rank."""
        for module in list(model.modules()):
            for name, whole in list(module.named_parameters(recurse=False)):
                if not isinstance(whole, DTensor):
                    self.parameter(module, name, None)

    def columns(self, linear: nn.Linear, *pieces: Piece) -> None:
        """A linear layer of which each rank makes a part of the output, from an input that all have."""
        for name in ("weight", "bias"):
            self.parameter(linear, name, pieces)
        group = self.group
        linear.register_forward_pre_hook(lambda _, inputs: (copy(inputs[0], group), *inputs[1:]))

    def rows(self, linear: nn.Linear, then_split: bool = False) -> None:
        """A linear layer of which each rank has a part of the input; the output is summed.

        With ``then_split`` each rank makes a part of what follows from the whole output.
        """
        self.parameter(linear, "weight", [Piece(linear.in_features)], dim=1)
        self.parameter(linear, "bias", [Piece(linear.out_features, split=False, once=True)])

        group = self.group

        def leave(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            output = total(output, group)
            return copy(output, group) if then_split else output

        linear.register_forward_hook(leave)

    def vocabulary(self, embedding: nn.Embedding, head: nn.Linear | None) -> None:
        """An embedding and a head of which each rank has a part of the tokens; the head's scores are put together."""
        group, own = self.group, embedding.num_embeddings // self.ranks
        first = self.rank * own

        def look_up(tokens: Tensor) -> Tensor:
            place = tokens - first
            here = (place >= 0) & (place < own)
            found = F.embedding(place.where(here, 0), embedding.weight)
            return total(found.masked_fill(~here.unsqueeze(-1), 0), group)

        self.parameters(embedding, "weight")
        embedding.forward = look_up  # type: ignore[assignment,method-assign]
        if head is not None:
            self.columns(head, Piece(head.out_features))
            head.register_forward_hook(lambda _, inputs, scores: join(scores, group))
