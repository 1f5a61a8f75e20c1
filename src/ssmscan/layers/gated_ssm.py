"""GatedSSM: a gated diagonal scan between two projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.mixer import Kept, Mixer, positive
from ssmscan.layers.parameters import wide
from ssmscan.layers.start import check_memory, spread_decay_bias_
from ssmscan.layers.state import advance
from ssmscan.ops import linear_scan, linear_scan_step

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class GatedSSMState(NamedTuple):
    """What a :class:`GatedSSM` remembers: ``scan``, (b, d), the state of its scan."""

    scan: Tensor


class GatedSSM(Mixer):
    """A gated diagonal state-space layer: input-dependent gates, scan, output gate.

    .. math::
        (v, i, o, r) = W_{in} x, \\qquad
        a = \\sigma(r + b_a), \\quad b = \\sigma(i + b_b), \\quad c = \\mathrm{silu}(o), \\\\
        h_t = a_t h_{t-1} + b_t v_t, \\qquad y = W_{out} (c_t h_t)

    The decay reaches the scan as the logarithm ``log σ(r + b_a)`` in float32, for bfloat16 rounds 0.999 to 1.

    At the start the channels remember for 1 to 1000 tokens, evenly spread in the logarithm (``memory``): the time
    constant τ of a channel gives a = exp(-1/τ), hence b_a = -log(expm1(1/τ)). A uniform spread of the bias would leave
    nearly all channels with a memory of a few tokens, and a gradient cannot find what was forgotten. The input gate
    starts at b = sqrt(1 - a²), so that every channel has the same variance whatever its memory.

    Args:
        d_model: width m of the input and the output.
        expand: the scan has d = expand · d_model channels. Default 4.
        memory: shortest and longest time constant at the start, in tokens. Default (1, 1000).
        device, dtype: of the parameters; the two gate biases are float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state a :class:`GatedSSMState`.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.

    The layer is the gated SSM of Blouir et al., "Birdie: Advancing State Space Models with Reward-Driven Objectives
    and Curricula" (2024). Time constants spread in the logarithm are those of S4, see Gu et al., "How to Train Your
    HiPPO" (2022); the scale of the input gate is that of Orvieto et al., "Resurrecting Recurrent Neural Networks for
    Long Sequences" (2023), section 3.4.

    Example:
        >>> import torch
        >>> from ssmscan.layers import GatedSSM
        >>> layer, x = GatedSSM(d_model=8), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> steps = torch.cat([layer(x[:, t : t + 1], state) for t in range(5)], 1)
        >>> torch.allclose(layer(x), steps, atol=1e-5)
        True
    """

    _keep_wide = ("decay_bias", "input_bias")
    _no_weight_decay = ("decay_bias", "input_bias")

    def __init__(
        self,
        d_model: int,
        expand: int = 4,
        memory: tuple[float, float] = (1.0, 1000.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("GatedSSM", d_model=d_model, expand=expand)
        check_memory("GatedSSM", memory)
        self.d_model = d_model
        self.d_inner = expand * d_model
        self.memory = memory
        # Rows [v, i, o, r].
        self.in_proj = nn.Linear(d_model, 4 * self.d_inner, bias=False, device=device, dtype=dtype)
        self.decay_bias = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide(dtype)))
        self.input_bias = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide(dtype)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projections anew and spread the channels' memories over ``memory``."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        rate = spread_decay_bias_(self.decay_bias, self.memory)
        # logit(b) = log b - log(1 - b), where 1 - b = a² / (1 + b).
        gate = torch.sqrt(-torch.expm1(-2 * rate))
        self.input_bias.copy_(gate.log() + gate.log1p() + 2 * rate)

    def state_layout(self) -> GatedSSMState:
        return GatedSSMState._make([Kept((self.d_inner,), self.state_dtype())])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: GatedSSMState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        v, i, o, r = self.in_proj(x).chunk(4, -1)
        tokens = {
            "x": v,
            "b": torch.sigmoid(i + self.input_bias).to(v.dtype),
            "c": F.silu(o),
            "log_a": F.logsigmoid(r + self.decay_bias),
        }
        scan = None if state is None else state.scan
        return self.out_proj(advance(self.context, linear_scan, linear_scan_step, scan, cu_seqlens, tokens))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_inner={self.d_inner}, memory={self.memory}"
