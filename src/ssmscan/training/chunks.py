"""Long sequences on one device: chunk by chunk, with the states carried on and the gradients carried back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssmscan.layers.state import Held
from ssmscan.models import SSMForCausalLM
from ssmscan.models.cache import SSMCache
from ssmscan.models.loss import IGNORE
from ssmscan.ops.packing import check_cu_seqlens
from ssmscan.shapes import check_integer, check_rank, error

if TYPE_CHECKING:
    from jaxtyping import Int


class _Chunk(NamedTuple):
    """A stretch of the tokens: arguments of the model.

    ``rows`` is how many sequences it has, ``goes_on`` whether the last of them, or each of a batch, goes on behind it.
    """

    inputs: dict[str, Tensor]
    rows: int
    goes_on: bool


def chunked_backward(
    model: SSMForCausalLM,
    input_ids: Int[Tensor, "b l"],
    shift_labels: Int[Tensor, "b l"],
    chunk: int,
    *,
    truncate: bool = False,
    cu_seqlens: Int[Tensor, " s+1"] | None = None,
    num_items_in_batch: int | Tensor | None = None,
    scale: float | Tensor = 1.0,
    stretch: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: inputs,
    before_backward: Callable[[bool], None] = lambda last: None,
) -> Tensor:
    """Add the gradients of a model's loss to its parameters, with the activations of one chunk in memory at a time.

    .. math::
        h_i = f(h_{i-1}, x_i), \\qquad L = \\sum_i L_i(h_{i-1}, x_i), \\qquad
        \\frac{\\partial L}{\\partial h_{i-1}} = \\frac{\\partial L_i}{\\partial h_{i-1}}
            + \\Bigl(\\frac{\\partial h_i}{\\partial h_{i-1}}\\Bigr)^{\\!\\top} \\frac{\\partial L}{\\partial h_i}

    over chunks x_i of the tokens. A first pass computes the states h_i between them, without a derivative. Then each
    chunk, from the last to the first, is computed again from the state that enters it, and its backward starts from its
    loss and from the gradient of the state that leaves it. The loss and the gradients are those of the whole sequence;
    it takes a third more time than the plain backward. Memory holds a state for each bound, and one chunk. Attention's
    keys and values are a state that grows with the sequence; they are held once.

    Args:
        model: all of whose layers have a state.
        input_ids: the tokens, in 0 … v-1.
        shift_labels: what is to be foretold at each token, -100 where nothing is.
        chunk: tokens of a row that go through the model at once, the last chunk may have fewer (tokens).
        truncate: let no gradient pass from one chunk to the one before, which saves the first pass. Default False.
        cu_seqlens: bounds of s packed sequences in a batch of one, as in :func:`ssmscan.linear_scan`. From one chunk to
            the next the state of the sequence between them alone is carried.
        num_items_in_batch: by how many tokens to divide the sum of the losses. Default: those that are to be foretold.
        scale: the gradients are multiplied by it. Default 1.
        stretch: of the model's arguments for a chunk, ``input_ids``, ``shift_labels`` and ``cu_seqlens`` by name, those
            of this process, where others have the rest of each chunk (:func:`ssmscan.distributed.parallelize`, "cp").
            Default all.
        before_backward: is called before the backward of each chunk, with whether it is the last one's.

    Returns:
        the loss, a scalar without a gradient.

    Raises:
        TypeError, ValueError: a chunk that is not a positive integer, a wrong shape, bounds that do not fit.
        NotImplementedError: a layer that reads the sequence from both ends; attention over packed sequences.
        RuntimeError: a model under gradient checkpointing, which would compute each chunk a third time.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), along the time.

    Example:
        >>> import torch
        >>> from ssmscan.models import SSMConfig, SSMForCausalLM
        >>> from ssmscan.training import chunked_backward
        >>> model = SSMForCausalLM(SSMConfig(vocab_size=11, hidden_size=8, mixers=["mamba"]))
        >>> tokens = torch.randint(11, (1, 101))
        >>> loss = chunked_backward(model, tokens[:, :-1], tokens[:, 1:], chunk=30)
        >>> torch.allclose(loss, model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss)
        True
    """
    check_integer("chunked_backward", "chunk", chunk, 1)
    check_rank("chunked_backward", "input_ids", input_ids, "b, l")
    if shift_labels.shape != input_ids.shape:
        rule = f"shift_labels must have the shape of input_ids, {tuple(input_ids.shape)}"
        raise ValueError(error("chunked_backward", rule, tuple(shift_labels.shape)))
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != IGNORE).sum()
    check_carries(model, packed=cu_seqlens is not None)
    if cu_seqlens is not None:
        # On the host, where they are cut, for of a chunk's own nothing would show that they were not in order.
        cu_seqlens = cu_seqlens.cpu()
        check_cu_seqlens("chunked_backward", cu_seqlens, cu_seqlens.new_empty(()).expand(input_ids.shape))
    parts = list(_chunks(input_ids, shift_labels, chunk, cu_seqlens))
    reader = _Reader(model, input_ids.shape[1], num_items_in_batch, stretch, before_backward)
    state = [tensor for layer in model.make_cache(input_ids.shape[0], reader.longest).layers for tensor in layer.state]
    # A backward runs without autocast; the reader turns it on again.
    with torch.autocast(input_ids.device.type, enabled=False):
        return (_truncated if truncate else _exact)(reader, parts, state, scale)


def check_carries(model: SSMForCausalLM, packed: bool) -> None:
    """Refuse a model that cannot read a sequence chunk by chunk, or sequences that are ``packed``."""
    if any(_growing(model)) and packed:
        advice = "Concatenate them into one sequence (in a run: task.packing: concatenate)."
        rule = "packed sequences must have no attention, which would keep as much of each as of the longest"
        raise NotImplementedError(error("chunked_backward", rule, "both", advice))


def _growing(model: SSMForCausalLM) -> list[bool]:
    """Which tensors of the layers' states have every token so far."""
    return [-1 in kept.shape for block in model.backbone.blocks for kept in block.mixer.state_layout()]


def _truncated(reader: _Reader, parts: list[_Chunk], state: list[Tensor], scale: float | Tensor) -> Tensor:
    losses = []
    for part in parts:
        cache = reader.enter(part, state)
        loss = reader.loss(part, cache)
        reader.before_backward(part is parts[-1])
        (loss * scale).backward()
        losses.append(loss.detach())
        state = _leave(part, cache)
    return torch.stack(losses).sum()


def _exact(reader: _Reader, parts: list[_Chunk], state: list[Tensor], scale: float | Tensor) -> Tensor:
    losses = []
    entering = reader.states(parts, state)
    gradients: list[Tensor | None] = [None] * len(state)
    for part in reversed(parts):
        leaves = [_leaf(tensor) for tensor in entering.pop()]
        cache = reader.enter(part, leaves)
        loss = reader.loss(part, cache)
        # States with a history are overwritten along with it.
        ends = zip(_leave(part, cache), gradients, strict=True)
        pairs = [(after, gradient) for after, gradient in ends if gradient is not None and part.goes_on]
        roots, starts = [after for after, _ in pairs], [gradient for _, gradient in pairs]
        reader.before_backward(part is parts[0])
        torch.autograd.backward([loss * scale, *roots], [None, *starts])
        losses.append(loss.detach())
        gradients = [leaf.grad for leaf in leaves]
    return torch.stack(losses[::-1]).sum()


class _Reader:
    """The model as it reads chunks: each from a given state, under the autocast that was on when this was made."""

    def __init__(
        self,
        model: SSMForCausalLM,
        longest: int,
        items: int | Tensor,
        stretch: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        before_backward: Callable[[bool], None],
    ) -> None:
        self.model, self.longest, self.items = model, longest, items
        self.stretch, self.before_backward = stretch, before_backward
        device = model.device.type
        self.cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.growing = _growing(model)

    def _autocast(self) -> torch.autocast:
        # What it keeps of a weight without a derivative would be taken for the one that has it.
        device = self.model.device.type
        return torch.autocast(device, self.cast, enabled=self.cast is not None, cache_enabled=False)

    def loss(self, part: _Chunk, cache: SSMCache) -> Tensor:
        """The chunk's part of the loss."""
        with self._autocast():
            inputs: dict[str, Any] = self.stretch(part.inputs)
            return self.model(**inputs, cache=cache, num_items_in_batch=self.items, return_logits=False).loss

    @torch.no_grad()
    def states(self, parts: list[_Chunk], state: list[Tensor]) -> list[list[Tensor]]:
        """The state that enters each chunk; ``state`` enters the first."""
        entering = [state]
        for part in parts[:-1]:
            cache = self.enter(part, entering[-1])
            with self._autocast():
                self.model(**self.stretch(part.inputs) | {"shift_labels": None}, cache=cache, logits_to_keep=1)
            left = _leave(part, cache)
            # What it has of every token so far stands for what it had before: a chunk sees nothing of later tokens.
            entering = [
                [new if grows else own for own, new, grows in zip(earlier, left, self.growing, strict=True)]
                for earlier in entering
            ]
            entering.append(left)
        return entering

    def enter(self, part: _Chunk, state: list[Tensor]) -> SSMCache:
        """A cache that begins with a copy of ``state``, and with nothing in the rows of sequences that begin later."""
        cache = self.model.make_cache(part.rows, self.longest)
        given = iter(state)
        for layer in cache.layers:
            rows = [torch.cat([next(given), new[len(state[0]) :]]) for new in layer.state]
            layer.state = Held(type(layer.state)(*rows))
        return cache


def _leave(part: _Chunk, cache: SSMCache) -> list[Tensor]:
    """The state that enters the next chunk."""
    tensors = [tensor for layer in cache.layers for tensor in layer.state.state]
    if not part.goes_on:
        return [torch.zeros_like(tensor[-1:]) for tensor in tensors]
    # A copy, or the states of all its sequences would stay with the last.
    return [tensor[-1:].clone() for tensor in tensors] if "cu_seqlens" in part.inputs else tensors


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor as one whose gradient is wanted, where it can have one: a number of tokens has none."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _chunks(tokens: Tensor, targets: Tensor, size: int, cu_seqlens: Tensor | None) -> Iterator[_Chunk]:
    l = tokens.shape[1]
    for first in range(0, max(l, 1), size):
        last = min(first + size, l)
        inputs = {"input_ids": tokens[:, first:last], "shift_labels": targets[:, first:last]}
        if cu_seqlens is None:
            yield _Chunk(inputs, tokens.shape[0], True)
        else:
            # Of the sequences without tokens here nothing remains.
            here = cu_seqlens.clamp(first, last).unique() - first
            inputs["cu_seqlens"] = here.to(tokens.device)
            yield _Chunk(inputs, len(here) - 1, last not in cu_seqlens)
