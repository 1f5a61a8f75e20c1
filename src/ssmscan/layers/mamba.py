"""Mamba: the mixer of Mamba-1 around a selective scan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.conv import ShortConv
from ssmscan.layers.mixer import Kept, Mixer, positive
from ssmscan.layers.parameters import WideParameters, wide
from ssmscan.layers.start import check_steps, draw_step_bias_
from ssmscan.layers.state import advance
from ssmscan.ops import selective_scan, selective_scan_step

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class MambaState(NamedTuple):
    """What a :class:`Mamba` remembers: ``conv``, (b, w-1, d), its last inputs; ``scan``, (b, d, n)."""

    conv: Tensor
    scan: Tensor


class StepProjection(WideParameters, nn.Linear):
    """A linear layer whose bias stays float32, and may be left to what comes next.

    The bias of a step size is near -5 and rounding it, or a sum with it, to bfloat16 costs one part in a hundred of the
    step. So :class:`ssmscan.layers.Mamba` calls the layer without its bias and hands that to the scan, which adds in
    float32. A wrapper around the layer, such as an adapter, knows nothing of this: it gets the sum, in float32.
    """

    _keep_wide = ("bias",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=wide(dtype)))

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        y = F.linear(x, self.weight)
        return y + self.bias if with_bias else y


class Mamba(Mixer):
    """Mamba-1's mixer: a short convolution and a selective scan, gated.

    .. math::
        (u, z) = W_{in} x, \\qquad u' = \\mathrm{silu}(\\mathrm{conv}(u)), \\qquad (\\delta, B, C) = W_x u', \\\\
        \\Delta = \\mathrm{softplus}(W_{dt} \\delta + b_{dt}), \\quad
        h_t = e^{\\Delta_t A} h_{t-1} + \\Delta_t B_t u'_t, \\quad
        y = W_{out} \\bigl( (C_t \\cdot h_t + D u'_t) \\, \\mathrm{silu}(z_t) \\bigr)

    with d = expand · d_model channels of n = d_state states each, and A = -exp(A_log).

    Args:
        d_model: width m of the input and the output.
        d_state: states n of a channel. Default 16.
        d_conv: width w of the convolution, 2 to 8. Default 4.
        expand: channels for each of d_model. Default 2.
        dt_rank: width of δ; "auto" is d_model / 16, rounded up.
        dt_min, dt_max: step sizes at the start are drawn log-uniformly between them. Default 0.001 and 0.1.
        dt_init_floor: and are this at least. Default 1e-4.
        conv_bias: whether the convolution has a bias. Default True.
        bias: whether the projections into and out of the layer have one. Default False.
        bcdt_rms_eps: None, or the epsilon of an RMS norm without weight over each of δ, B and C, as FalconMamba has.
        device, dtype: of the parameters; A_log, D and the bias of the step size are float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state a :class:`MambaState`.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4. Parameters have
    the names of the published checkpoints, and start as there: A_log = log(1 … n), D = 1.

    Example:
        >>> import torch
        >>> from ssmscan.layers import Mamba
        >>> layer, x = Mamba(d_model=8), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> chunks = torch.cat([layer(x[:, :3], state), layer(x[:, 3:], state)], 1)
        >>> torch.allclose(layer(x), chunks, atol=1e-5)
        True
    """

    _keep_wide = ("A_log", "D")
    _no_weight_decay = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        bcdt_rms_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("Mamba", d_model=d_model, d_state=d_state, expand=expand)
        check_steps("Mamba", dt_min, dt_max, dt_init_floor)
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        positive("Mamba", dt_rank=self.dt_rank)
        self.dt_start = (dt_min, dt_max, dt_init_floor)
        self.bcdt_rms_eps = bcdt_rms_eps
        # Rows [u, z].
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = ShortConv(self.d_inner, d_conv, conv_bias, device=device, dtype=dtype)
        # Rows [δ, B, C].
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = StepProjection(self.dt_rank, self.d_inner, device=device, dtype=dtype)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=wide(dtype)))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide(dtype)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        draw_step_bias_(self.dt_proj.bias, *self.dt_start)
        self.A_log.copy_(torch.ones_like(self.A_log).cumsum(1).log())
        nn.init.ones_(self.D)

    def state_layout(self) -> MambaState:
        dtype = self.state_dtype()
        return MambaState._make([self.conv1d.kept(dtype), Kept((self.d_inner, self.d_state), dtype)])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: MambaState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        conv, scan = state or (None, None)
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.conv1d(u, conv, cu_seqlens, mask)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        if self.bcdt_rms_eps is not None:
            dt, B, C = (F.rms_norm(part, part.shape[-1:], eps=self.bcdt_rms_eps) for part in (dt, B, C))
        if isinstance(self.dt_proj, StepProjection):
            dt, dt_bias = self.dt_proj(dt, with_bias=False), self.dt_proj.bias
        else:
            dt, dt_bias = self.dt_proj(dt), None
        tokens = {"x": u, "dt": dt, "B": B, "C": C, "z": z}
        fixed = {"A": self.A_log, "A_is_log": True, "D": self.D, "dt_bias": dt_bias, "dt_softplus": True}
        y = advance(self.context, selective_scan, selective_scan_step, scan, cu_seqlens, tokens, **fixed)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}"
