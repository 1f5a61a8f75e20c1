"""Splitter: parameters of a module split over the ranks of tensor parallelism, piece by piece."""

from collections.abc import Callable, Sequence
from itertools import islice
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ssmscan.distributed.collectives import copy, join, spread_linear, total
from ssmscan.shapes import error


class Piece(NamedTuple):
    """Consecutive rows of a parameter, and what a rank has of them."""

    size: int
    # Each rank has its part of them. Otherwise all have all of them, and the gradient is the sum of the ranks'.
    split: bool = True
    # Those of a piece that is not split which this rank computes with, in this order; None is all.
    rows: Tensor | None = None

    def here(self, ranks: int) -> int:
        """How many rows a rank computes with."""
        if self.rows is not None:
            return self.rows.shape[0]
        return self.size // ranks if self.split else self.size


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
        self.count = len(pieces or [None])
        # What the layer of the parameter has put together for the forward that runs.
        self.ready: dict[Local, Tensor] = {}

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
        if self in self.ready:
            return self.ready[self]
        return _Local.apply((self,), *pieces)[0]

    def together(self, pieces: list[Tensor]) -> Tensor:
        """What a rank computes with, of its parts of the pieces."""
        for i, piece in enumerate(self.pieces or ()):
            if piece.rows is not None:
                pieces[i] = pieces[i].index_select(self.dim, piece.rows)
        return pieces[0].view_as(pieces[0]) if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def apart(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of the pieces; those that all ranks have are still to be summed."""
        if self.pieces is None:
            return [gradient.contiguous()]
        sizes = [piece.here(self.mesh.size()) for piece in self.pieces]
        parts = [part.contiguous() for part in gradient.split(sizes, self.dim)]
        for i, piece in enumerate(self.pieces):
            if piece.rows is not None:
                whole = list(gradient.shape)
                whole[self.dim] = piece.size
                parts[i] = gradient.new_zeros(whole).index_add(self.dim, piece.rows, parts[i])
        return parts


class _Local(torch.autograd.Function):
    """Several parameters in one step, for one costs the host as much as several launches, and a sum some more."""

    @staticmethod
    def forward(ctx: Any, forms: Sequence[Local], *pieces: DTensor) -> tuple[Tensor, ...]:
        ctx.forms, ctx.specs = forms, [piece._spec for piece in pieces]
        rest = iter(pieces)
        own = [list(islice(rest, form.count)) for form in forms]
        made = [form.together([part.to_local() for part in parts]) for form, parts in zip(forms, own, strict=True)]
        frozen = (tensor for tensor, parts in zip(made, own, strict=True) if not parts[0].requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[DTensor | None, ...]:
        parts = [part for form, gradient in zip(ctx.forms, gradients, strict=True) for part in form.apart(gradient)]
        pieces = [piece for form in ctx.forms for piece in form.pieces or [None]]
        common = [i for i, piece in enumerate(pieces) if piece is not None and not piece.split]
        if common:
            row = torch.cat([parts[i].flatten() for i in common])
            dist.all_reduce(row, group=ctx.forms[0].mesh.get_group())
            for i, summed in zip(common, row.split([parts[i].numel() for i in common]), strict=True):
                parts[i] = summed.view_as(parts[i])
        return None, *(DTensor(part, spec, requires_grad=False) for part, spec in zip(parts, ctx.specs, strict=True))


class Layer:
    """Puts the parameters of a split layer together in one step, which is valid while its forward runs.

    It begins with the layer's first projection, before which not all of its parameters may be there: FSDP gathers them.
    """

    def __init__(self, layer: nn.Module) -> None:
        lists = [part for part in layer.modules() if isinstance(part, ParametrizationList)]
        self.lists = lists
        self.forms = [cast(Local, made[0]) for made in lists]
        self.ready: dict[Local, Tensor] = {}
        for form in self.forms:
            form.ready = self.ready
        first = next(part for part in layer.children() if isinstance(part, nn.Linear))
        first.register_forward_pre_hook(self.begin)
        layer.register_forward_hook(self.end, always_call=True)

    @torch.compiler.disable
    def begin(self, *_: Any) -> None:
        pieces = [getattr(made, f"original{i}") for made in self.lists for i in range(cast(Local, made[0]).count)]
        self.ready.update(zip(self.forms, _Local.apply(self.forms, *pieces), strict=True))

    def end(self, *_: Any) -> None:
        self.ready.clear()


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
        _compute(linear, lambda linear, x: spread_linear(x, linear.weight, linear.bias, group))

    def rows(
        self, linear: nn.Linear, then_split: bool = False, project: Callable[[Any, Tensor], Tensor] | None = None
    ) -> None:
        """A linear layer of which each rank has a part of the input; the output is summed.

        With ``then_split`` each rank makes a part of what follows from the whole output. ``project`` makes the sum from
        an input that is no tensor, and the weight.
        """
        self.parameter(linear, "weight", [Piece(linear.in_features)], dim=1)
        self.parameter(linear, "bias", None)
        group = self.group

        def summed(linear: nn.Linear, x: Any) -> Tensor:
            y = project(x, linear.weight) if project else total(F.linear(x, linear.weight), group)
            if linear.bias is not None:
                y = y + linear.bias.to(y.dtype)
            return copy(y, group) if then_split else y

        _compute(linear, summed)

    def embedding(self, embedding: nn.Embedding) -> None:
        """An embedding of which each rank has a part of the tokens."""
        group, own = self.group, embedding.num_embeddings // self.ranks
        first = self.rank * own

        def look_up(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
            place = tokens - first
            here = (place >= 0) & (place < own)
            found = F.embedding(place.where(here, 0), embedding.weight)
            return total(found.masked_fill(~here.unsqueeze(-1), 0), group)

        self.parameters(embedding, "weight")
        _compute(embedding, look_up)

    def head(self, head: nn.Linear) -> None:
        """A head of which each rank scores a part of the tokens; the scores are put together."""
        group = self.group
        self.columns(head, Piece(head.out_features))
        head.register_forward_hook(lambda _, inputs, scores: join(scores, group))


def _compute(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Have a module compute ``forward(module, ...)``, and a copy of it ``forward(copy, ...)``."""
    module.forward = MethodType(forward, module)
