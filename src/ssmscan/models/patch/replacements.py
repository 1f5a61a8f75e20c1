"""What stands in transformers' model files for a slow path in PyTorch: its signature, and our operation behind it.

There activations are channels first, (b, d, l), the state of a convolution is (b, d, w) with one input more than the
next output reads, and packed sequences are told apart by ``seq_idx``, (b, l), a number for each token that changes
from sequence to sequence. Functions take any further keyword, for the models hand theirs through to all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ssmscan.ops import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    linear_scan,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from ssmscan.shapes import check_shape, error

# The bounds of the sequences in a seq_idx, which all layers of a model share, and the version that they are of.
_bounds = WeakTensorKeyDictionary()
# By what names a model is told of packed sequences.
_PACKING = ("seq_idx", "cu_seqlens")


def conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> Tensor:
    x = hidden_states.transpose(1, 2)
    bounds = _given_bounds("causal_conv1d_fn", seq_idx, cu_seqlens, x)
    if bounds is None:
        y, _state = causal_conv1d(x, weight, bias, activation=activation)
    else:
        y, _state = causal_conv1d(_joined(x), weight, bias, activation=activation, cu_seqlens=bounds)
        y = y.view(x.shape)
    return y.transpose(1, 2)


def conv_update(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    state = conv_state.transpose(1, 2)
    return causal_conv1d_step(hidden_states[..., 0], weight, bias, activation=activation, h=state)[..., None]


def mamba_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    x, dt, B, C = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
    gate = None if z is None else z.transpose(1, 2)
    y, h = selective_scan(x, dt, A, B, C, D, gate, dt_bias=delta_bias, dt_softplus=delta_softplus)
    y = y.transpose(1, 2)
    return (y, h) if return_last_state else y


def mamba_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    return selective_scan_step(hidden_states, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, h=state)


def mamba2_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    *,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    bounds = _given_bounds("mamba_chunk_scan_combined", seq_idx, cu_seqlens, hidden_states)
    if bounds is None:
        y, h = ssd(hidden_states, dt, A, B, C, D, z, **options, h0=initial_states)
        return (y, h) if return_final_states else y
    if initial_states is not None:
        rule = "seq_idx must be None where a cache is continued"
        raise NotImplementedError(error("mamba_chunk_scan_combined", rule, "a tensor", "Run packed sequences whole."))
    batch, length = hidden_states.shape[:2]
    inputs = (_joined(hidden_states), _joined(dt), A, _joined(B), _joined(C), D, None if z is None else _joined(z))
    y, h = ssd(*inputs, **options, cu_seqlens=bounds)
    y = y.view(hidden_states.shape)
    if not return_final_states:
        return y
    # Of a batch row, the state of its last sequence.
    ends = torch.arange(1, batch + 1, device=bounds.device, dtype=bounds.dtype) * length
    return y, h[torch.searchsorted(bounds, ends) - 1]


def mamba2_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    # One number of each head, which transformers expands over its channels, and A over its states too.
    dt, A = dt[..., 0], A[..., 0, 0]
    bias = None if dt_bias is None else dt_bias[..., 0]
    return ssd_step(hidden_states, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=dt_softplus, h=state)


def unfused(*_: Any, **__: Any) -> None:
    """No whole layer in one call: transformers then calls the projections as modules, so that adapters see tokens."""


def norm(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """The forward of an RMS norm, gated or not, which has groups if its release and model say so."""
    # A module takes microseconds to find that it has no such attribute.
    own = vars(self)
    return gated_rms_norm(
        hidden_states,
        self.weight,
        gate,
        eps=own["variance_epsilon"],
        group_size=own.get("group_size") or hidden_states.shape[-1] // own.get("n_groups", 1),
        norm_before_gate=own.get("norm_before_gate", False),
    )


def rg_lru_scan(
    self: Any, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, recurrent_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loop of an RG-LRU, whose inputs come scaled; ``reset``, (b, l, 1), is true where a sequence begins."""
    return linear_scan(hidden_states, recurrent_gate * ~reset, h0=recurrent_states)


def packed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a model with a head, whose backbone is told of packed sequences, as transformers forgets."""

    @functools.wraps(forward)
    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        packing = {name: kwargs.pop(name) for name in _PACKING if kwargs.get(name) is not None}
        if not packing:
            return forward(self, *args, **kwargs)
        handle = self.backbone.register_forward_pre_hook(
            lambda _backbone, args, kwargs: (args, kwargs | packing), with_kwargs=True
        )
        try:
            return forward(self, *args, **kwargs)
        finally:
            handle.remove()

    return telling


def unpacked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a model whose scans transformers does not tell of packed sequences, refusing these."""

    @functools.wraps(forward)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in _PACKING:
            if kwargs.get(name) is not None:
                rule = f"{name} must be None, for transformers does not hand it to the scans of this model"
                raise NotImplementedError(error(type(self).__name__, rule, "a tensor", "Pad, or use SSMForCausalLM."))
        return forward(self, *args, **kwargs)

    return refusing


def _given_bounds(function: str, seq_idx: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """The bounds of the packed sequences in x (b, l, ...), laid end to end, or None where none are packed."""
    if seq_idx is None:
        return cu_seqlens
    check_shape(function, "seq_idx", seq_idx, "b, l", x.shape[:2], "the input")
    if seq_idx.is_inference():
        return _changes(seq_idx)
    version, bounds = _bounds.get(seq_idx, (None, None))
    if version != seq_idx._version:
        bounds = _changes(seq_idx)
        _bounds[seq_idx] = seq_idx._version, bounds
    return bounds


def _changes(seq_idx: Tensor) -> Tensor:
    """Where a sequence begins among the tokens of all batch rows, and their number."""
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([seq_idx.numel()])])


def _joined(t: Tensor) -> Tensor:
    """The batch rows, one after the other in a batch of 1."""
    return t.flatten(0, 1)[None]
