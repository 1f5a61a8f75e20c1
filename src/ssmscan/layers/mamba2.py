"""Mamba2: the mixer of Mamba-2 around the ssd scan, causal or reading from both ends."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmscan.layers.conv import ShortConv
from ssmscan.layers.mixer import Kept, Mixer, no_state, positive
from ssmscan.layers.norm import GatedRMSNorm
from ssmscan.layers.parameters import wide
from ssmscan.layers.start import check_steps, draw_step_bias_
from ssmscan.layers.state import advance
from ssmscan.ops import ssd, ssd_bidirectional, ssd_step
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Mamba2State(NamedTuple):
    """What a :class:`Mamba2` remembers: ``conv``, (b, w-1, d + 2gn), its last inputs; ``scan``, (b, h, p, n)."""

    conv: Tensor
    scan: Tensor


class Mamba2(Mixer):
    """Mamba-2's mixer: a short convolution, a scan whose state is a matrix for each head, a gated norm.

    .. math::
        (z, u, B, C, \\delta) = W_{in} x, \\qquad (u', B', C') = \\mathrm{silu}(\\mathrm{conv}(u, B, C)), \\\\
        \\Delta = \\mathrm{softplus}(\\delta + b_{dt}), \\quad
        h_t = e^{\\Delta_t A} h_{t-1} + \\Delta_t \\, u'_t \\otimes B'_t, \\quad
        y = W_{out} \\, \\mathrm{rms}\\bigl( (h_t C'_t + D u'_t) \\, \\mathrm{silu}(z_t) \\bigr)

    with d = expand · d_model channels in h = d / headdim heads, and A = -exp(A_log), one number for each head.

    With ``causal=False`` every token sees the whole sequence: the scans from both ends are added, D u' once, and the
    kernel of the convolution reaches from w//2 tokens before to those after. There is no state then.

    Args:
        d_model: width m of the input and the output.
        d_state: states n of a channel. Default 128.
        d_conv: width w of the convolution, 2 to 8. Default 4.
        expand: channels for each of d_model. Default 2.
        headdim: channels p of a head, a divisor of d. Default 64.
        ngroups: groups g of heads that share B and C, a divisor of h. Default 1.
        A_init_range: -A at the start is drawn uniformly from it. Default (1, 16).
        dt_min, dt_max: step sizes at the start are drawn log-uniformly between them. Default 0.001 and 0.1.
        dt_init_floor: and are this at least. Default 1e-4.
        dt_limit: least and largest step size, always. Default (0, inf).
        norm_groups: groups of channels with a norm of their own; None is ngroups.
        norm_eps: epsilon of the norm. Default 1e-5.
        norm_before_gate: whether the gate silu(z) comes after the norm. Default False.
        conv_bias: whether the convolution has a bias. Default True.
        bias: whether the projections into and out of the layer have one. Default False.
        causal: whether a token sees only those before it. Default True.
        device, dtype: of the parameters; A_log, D and dt_bias are float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state a :class:`Mamba2State`.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.
        NotImplementedError: a state with ``causal=False``.

    Dao and Gu, "Transformers are SSMs" (2024), section 7. Parameters have the names of the published checkpoints, and
    start as there, D = 1.

    Example:
        >>> import torch
        >>> from ssmscan.layers import Mamba2
        >>> layer, x = Mamba2(d_model=8, headdim=4, d_state=16), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> chunks = torch.cat([layer(x[:, :3], state), layer(x[:, 3:], state)], 1)
        >>> torch.allclose(layer(x), chunks, atol=1e-5)
        True
    """

    _keep_wide = ("A_log", "D", "dt_bias")
    _no_weight_decay = ("A_log", "D", "dt_bias")
    # How many scans have B, C and δ of their own.
    _directions = 1

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, inf),
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        norm_groups = ngroups if norm_groups is None else norm_groups
        positive(name, d_model=d_model, d_state=d_state, expand=expand, headdim=headdim, ngroups=ngroups)
        positive(name, norm_groups=norm_groups)
        check_steps(name, dt_min, dt_max, dt_init_floor)
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.headdim = headdim
        self.ngroups = ngroups
        self.nheads = self.d_inner // headdim
        if self.d_inner % headdim:
            raise ValueError(error(name, f"headdim must divide expand * d_model = {self.d_inner}", headdim))
        if self.nheads % ngroups:
            raise ValueError(error(name, f"ngroups must divide the {self.nheads} heads", ngroups))
        if self.d_inner % norm_groups:
            raise ValueError(error(name, f"norm_groups must divide expand * d_model = {self.d_inner}", norm_groups))
        self.A_init_range = A_init_range
        self.dt_start = (dt_min, dt_max, dt_init_floor)
        self.dt_limit = tuple(dt_limit)
        self.causal = causal
        # B and C of all groups.
        self.pair_width = 2 * ngroups * d_state
        conv_width = self.d_inner + self.pair_width * self._directions
        # Rows [z, u, B, C, δ], and B, C and δ once for each direction.
        rows = self.d_inner + conv_width + self.nheads * self._directions
        self.in_proj = nn.Linear(d_model, rows, bias=bias, device=device, dtype=dtype)
        self.conv1d = ShortConv(conv_width, d_conv, conv_bias, centred=not causal, device=device, dtype=dtype)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide(dtype)))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide(dtype)))
        self.D = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide(dtype)))
        self.norm = GatedRMSNorm(self.d_inner, norm_eps, norm_groups, norm_before_gate, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        draw_step_bias_(self.dt_bias, *self.dt_start)
        self.A_log.uniform_(*self.A_init_range).log_()
        nn.init.ones_(self.D)

    def state_layout(self) -> Mamba2State:
        if not self.causal:
            raise NotImplementedError(no_state(type(self).__name__))
        dtype = self.state_dtype()
        scan = Kept((self.nheads, self.headdim, self.d_state), dtype)
        return Mamba2State._make([self.conv1d.kept(dtype), scan])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: Mamba2State | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        conv, scan = state or (None, None)
        z, u, dt = self.in_proj(x).split([self.d_inner, self.conv1d.out_channels, self.nheads], -1)
        u = self.conv1d(u, conv, cu_seqlens, mask)
        u, pair = u.split([self.d_inner, self.pair_width], -1)
        B, C = self._pair(pair)
        tokens = {"x": u.unflatten(-1, (self.nheads, self.headdim)), "dt": dt, "B": B, "C": C}
        fixed: dict[str, Any] = {"A": self.A_log, "A_is_log": True, "D": self.D, "dt_bias": self.dt_bias}
        fixed |= {"dt_softplus": True, "dt_limit": self.dt_limit}
        if self.causal:
            y = advance(self.context, ssd, ssd_step, scan, cu_seqlens, tokens, **fixed)
        else:
            y = self.context.run(ssd_bidirectional, **tokens, **fixed, cu_seqlens=cu_seqlens)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _pair(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """B and C, (b, l, g, n), from what the convolution made for one direction."""
        B, C = pair.unflatten(-1, (2, self.ngroups, self.d_state)).unbind(2)
        return B, C

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, headdim={self.headdim}"
        return f"{sizes}, ngroups={self.ngroups}, causal={self.causal}"
