"""SSMCache: the states of a model's layers, as transformers' generate carries them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ssmscan.layers import reorder
from ssmscan.layers.mixer import Mixer
from ssmscan.shapes import error

# Room of attention's state where nobody said how many tokens will come.
_ROOM = 64


class SSMCacheLayer(CacheLayerMixin):
    """The state of one layer, which the layer overwrites in place, and the number of tokens that it has seen."""

    # A compilable cache makes generate build masks of four axes.
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, mixer: Mixer, batch_size: int, max_length: int | None) -> None:
        super().__init__()
        self.room = _ROOM if max_length is None else max_length
        self.state = mixer.init_state(batch_size, self.room)
        # Axes that are as long as the longest sequence: attention alone has them.
        self._growing = [kept.shape.index(-1) + 1 if -1 in kept.shape else None for kept in mixer.state_layout()]
        self.length = 0
        self.is_initialized = True

    def make_room(self, tokens: int) -> None:
        """Have room for ``tokens`` more: twice as much as before, at least, where there is too little."""
        needed = self.length + tokens
        if needed <= self.room or not any(self._growing):
            return
        more = max(needed, 2 * self.room) - self.room
        self.room += more
        self.state = type(self.state)(
            *(
                tensor if axis is None else F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, more))
                for tensor, axis in zip(self.state, self._growing, strict=True)
            )
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the state exists from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        advice = "The layers of an SSMForCausalLM overwrite their states themselves."
        raise NotImplementedError(error("SSMCache", "update must not be called", "keys and values", advice))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0
        for tensor in self.state:
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        reorder(self.state, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            rule = "crop must remove 0 tokens, for a state cannot forget the last ones"
            raise NotImplementedError(error("SSMCache", rule, tokens_to_remove))


class SSMCache(Cache):
    """The states of all layers before the next token: what ``make_cache`` makes, and forward takes and returns.

    Each forward reads it first and overwrites it in place. ``get_seq_length()`` tokens were seen so far, padding
    included; ``reset()`` forgets them; ``copy.deepcopy`` keeps a state to come back to.

    Args:
        mixers: the layers, first to last.
        batch_size: number of sequences.
        max_length: tokens of a sequence that attention has room for at first; None is a few. The room grows.
    """

    layers: list[SSMCacheLayer]

    def __init__(self, mixers: Iterable[Mixer], batch_size: int, max_length: int | None = None) -> None:
        super().__init__(layers=[SSMCacheLayer(mixer, batch_size, max_length) for mixer in mixers])

    def make_room(self, tokens: int) -> None:
        """Have room for ``tokens`` more in every layer."""
        for layer in self.layers:
            layer.make_room(tokens)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` that every layer has seen."""
        for layer in self.layers:
            layer.length += tokens
