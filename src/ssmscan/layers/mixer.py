"""What all mixers share: the checks of a forward's arguments, and the state before the first token."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmscan.layers.context import Context
from ssmscan.layers.parameters import WideParameters
from ssmscan.layers.state import recomputing
from ssmscan.shapes import check_rank, check_tensors, error


class Kept(NamedTuple):
    """What a tensor of a state has for one sequence. An axis of -1 is as long as the longest sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Mixer(WideParameters):
    """A layer that mixes tokens, ``y = mixer(x, state=None, cu_seqlens=None, mask=None)``, without norm and residual.

    - x: (b, l, m), any floating dtype;
    - state: None (zeros), or what :meth:`init_state` made. It is read first and overwritten with the state after the
      last token, for a single token as for a chunk of any length. The new state carries no gradient, unless its
      tensors were computed with one: a copy of a tensor that requires one comes back with the history of the new state;
    - cu_seqlens: bounds of s packed sequences, as in :func:`ssmscan.linear_scan`; the state then has s rows;
    - mask: (b, l), bool or 0 and 1: False marks padding before a sequence. The outputs of the others, and the state,
      are those of the sequence without it; what stands at a padded place has no meaning.

    Subclasses give :meth:`state_layout`, call :meth:`enter` first, and reach other tokens through ``context`` alone.
    """

    d_model: int
    context = Context()
    # The dtype of the parameters; None asks the one of reference, which sharded ones gathered in another do not show.
    parameter_dtype: torch.dtype | None = None

    def state_layout(self) -> Any:
        """The layer's NamedTuple of states, with a :class:`Kept` in place of each tensor."""
        raise NotImplementedError

    def reference_parameter(self) -> nn.Parameter:
        """The parameter on whose device, and in whose dtype but float32 at least, states are kept."""
        return getattr(self, self._keep_wide[0])

    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the parameter of reference is kept."""
        return self.parameter_dtype or self.reference_parameter().dtype

    def state_dtype(self) -> torch.dtype:
        """float32, or float64 in a layer of float64."""
        return torch.promote_types(self.stored_dtype(), torch.float32)

    def init_state(self, batch_size: int, max_length: int | None = None) -> Any:
        """The state before the first token of ``batch_size`` sequences.

        Only attention needs ``max_length``, the most tokens of a sequence; the other layers take any number.
        """
        layout = self.state_layout()
        device = self.reference_parameter().device
        made = []
        for shape, dtype in layout:
            if -1 in shape and max_length is None:
                rule = "max_length must be given, the most tokens that a sequence will have"
                raise ValueError(error(type(self).__name__, rule, max_length, "Pass init_state(b, max_length=…)."))
            sizes = [max_length if size == -1 else size for size in shape]
            made.append(torch.zeros(batch_size, *sizes, dtype=dtype, device=device))  # type: ignore[arg-type]
        return type(layout)(*made)

    def enter(self, x: Tensor, state: Any, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
        """Refuse a forward's arguments that are not those of this layer; x, with zeros for the padding."""
        name = type(self).__name__
        check_tensors(name, {"x": x})
        check_rank(name, "x", x, "b, l, m")
        if x.shape[2] != self.d_model:
            raise ValueError(error(name, f"x must have shape (b, l, m) with m = {self.d_model}", tuple(x.shape)))
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            got = type(cu_seqlens).__name__
            raise TypeError(error(name, "cu_seqlens must be a torch.Tensor", got, "Use torch.tensor."))
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(error(name, "mask must be a torch.Tensor", type(mask).__name__))
            if mask.shape != x.shape[:2]:
                raise ValueError(error(name, f"mask must have shape (b, l) = {tuple(x.shape[:2])}", tuple(mask.shape)))
            if cu_seqlens is not None:
                rule = "mask must be None with cu_seqlens"
                raise ValueError(error(name, rule, "both", "Packed sequences have no padding."))
        if state is not None:
            self._check_state(state, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        return hide(x, mask)

    def _check_state(self, state: Any, rows: int) -> None:
        name = type(self).__name__
        if recomputing():
            rule = "state must be None where activations are recomputed in the backward"
            advice = "The state would advance twice: checkpoint without a state, or keep this layer's activations."
            raise RuntimeError(error(name, rule, type(state).__name__, advice))
        layout = self.state_layout()
        if type(state) is not type(layout):
            rule = f"state must be a {type(layout).__name__}"
            raise TypeError(error(name, rule, type(state).__name__, "Make it with init_state."))
        for field, tensor, (sizes, dtype) in zip(layout._fields, state, layout, strict=True):
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                rule = f"state.{field} must be a tensor of {dtype}, the dtype of states"
                raise TypeError(error(name, rule, got, "Make it with init_state."))
            shape = (rows, *sizes)
            if tensor.dim() == len(shape):
                shape = tuple(a if b == -1 else b for a, b in zip(tensor.shape, shape, strict=True))
            if tensor.shape != shape:
                rule = f"state.{field} must have shape {shape}"
                raise ValueError(error(name, rule, tuple(tensor.shape), f"Make it with init_state({rows})."))


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, (b, l, ...), with zeros at the padded places, whatever stands there."""
    return x if mask is None else x.masked_fill(~mask.bool().unsqueeze(-1), 0)


def no_state(name: str) -> str:
    """The error of a layer that reads a sequence from both ends."""
    advice = "It reads a sequence from both ends: give it the whole sequence."
    return error(name, "state must be None in a layer that is not causal", "one", advice)


def positive(name: str, **sizes: int) -> None:
    """Refuse a size that is not a positive integer."""
    for argument, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(error(name, f"{argument} must be a positive integer", size))
