"""One token of a mixer onto its cache: what takes the place of transformers' many small operations.

A step of a whole model is bound by the host, which spends on each of them as much as on a product of matrices. The
mixers' own ``forward`` stays for everything else: prompts, training, masks, packed sequences, offloaded weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops import causal_conv1d_step, selective_scan_step, ssd_step

# From a mixer, x (b, 1, m) and the layer of the cache, what comes before its last projection, (b, 1, d).
Step = Callable[[Any, Tensor, Any], Tensor]


def mamba(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a mixer of Mamba-1."""
    return _around(forward, _mamba)


def mamba2(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a mixer of Mamba-2."""
    return _around(forward, _mamba2)


def _around(forward: Callable[..., Any], step: Step) -> Callable[..., Any]:
    @functools.wraps(forward)
    def stepping(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        past = _past(self, hidden_states, kwargs)
        if past is None:
            return forward(self, hidden_states, *args, **kwargs)
        y = step(self, hidden_states, past)
        # Autocast converts it anyhow.
        return self.out_proj(y if torch.is_autocast_enabled(y.device.type) else y.to(hidden_states.dtype))

    return stepping


def _past(self: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> Any:
    """The mixer's layer of the cache, where the call is a step that needs nothing else; or None."""
    # Releases differ in its name.
    cache = kwargs.get("cache", kwargs.get("cache_params"))
    if cache is None or hidden_states.shape[1] != 1 or kwargs.get("attention_mask") is not None:
        return None
    layer = cache.layers[self.layer_idx]
    if layer.record_past or not layer.has_previous_state[0] or torch.is_grad_enabled():
        return None
    # An offloaded weight is fetched by a hook of its module, which is not called.
    return None if "_hf_hook" in vars(self.conv1d) else layer


def _convolved(self: Any, x: Tensor, layer: Any) -> Tensor:
    """The convolution of x, (b, 1, d). The cache is (b, d, w), with one input more than the next output reads."""
    conv, state = self.conv1d, layer.conv_states[0].transpose(1, 2)
    return causal_conv1d_step(x, conv.weight.squeeze(1), conv.bias, activation=self.activation, h=state)


def _mamba(self: Any, hidden_states: Tensor, layer: Any) -> Tensor:
    x, z = self.in_proj(hidden_states).chunk(2, -1)
    x = _convolved(self, x, layer)
    dt, B, C = self.x_proj(x).split_with_sizes([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
    dt_proj, quantized = self.dt_proj, False
    # FalconMamba and Jamba.
    if "dt_layernorm" in self._modules:
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        quantized = hasattr(self.config, "_is_quantized")
    dt = dt_proj(dt) - dt_proj.bias if quantized else F.linear(dt, dt_proj.weight)
    return selective_scan_step(
        x,
        dt,
        self.A_log,
        B,
        C,
        self.D,
        z,
        dt_bias=dt_proj.bias,
        dt_softplus=True,
        A_is_log=True,
        h=layer.recurrent_states[0],
    )


def _mamba2(self: Any, hidden_states: Tensor, layer: Any) -> Tensor:
    batch, groups, n = hidden_states.shape[0], self.n_groups, self.ssm_state_size
    d = self.intermediate_size
    z, x, dt = self.in_proj(hidden_states).split_with_sizes([d, self.conv_dim, self.num_heads], -1)
    x, B, C = _convolved(self, x, layer).split_with_sizes([d, groups * n, groups * n], -1)
    y = ssd_step(
        x.view(batch, 1, self.num_heads, self.head_dim),
        dt,
        self.A_log,
        B.view(batch, 1, groups, n),
        C.view(batch, 1, groups, n),
        self.D,
        dt_bias=self.dt_bias,
        dt_softplus=True,
        A_is_log=True,
        h=layer.recurrent_states[0],
    )
    return self.norm(y.view(batch, 1, -1), z)
