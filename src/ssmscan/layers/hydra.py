"""Hydra: Mamba-2's mixer read from both ends, as a quasi-separable matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssmscan.layers.mamba2 import Mamba2, Mamba2State
from ssmscan.ops import ssd_bidirectional

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Hydra(Mamba2):
    """Hydra's mixer: a scan from each end with parameters of its own, each of what lies strictly beside a token.

    .. math::
        (z, u, B, C, \\overleftarrow B, \\overleftarrow C, \\delta, \\overleftarrow\\delta) = W_{in} x, \\qquad
        (u', B', \\dots) = \\mathrm{silu}(\\mathrm{conv}(u, B, \\dots)), \\\\
        s = \\mathrm{shift}(\\mathrm{SS}(u')) + \\mathrm{flip}(\\mathrm{shift}(\\overleftarrow{\\mathrm{SS}}(
            \\mathrm{flip}(u')))) + (D + W_D u') \\, u', \\qquad
        y = W_{out} (\\mathrm{rms}(s) \\, \\mathrm{silu}(z))

    with Mamba-2's scan SS, and the same A and bias of the step size in both directions. A token meets itself in the
    last summand of s alone, whose weight depends on the token, one number for each head. The kernel of the convolution
    reaches as far to both sides when its width is odd.

    Args:
        d_model: width m of the input and the output.
        d_state: states n of a channel. Default 64.
        d_conv: width w of the convolution, 2 to 8. Default 7.
        expand, headdim, ngroups, A_init_range, dt_min, dt_max, dt_init_floor, norm_groups, norm_eps, conv_bias, bias,
            device, dtype: as in :class:`ssmscan.layers.Mamba2`.

    The forward is that of :class:`ssmscan.layers.Mixer`. There is no state: every output has seen the whole sequence.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: a wrong argument or shape.
        NotImplementedError: a state.

    Hwang, Lahoti, Dao and Gu, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (2024),
    section 3.

    Example:
        >>> import torch
        >>> from ssmscan.layers import Hydra
        >>> Hydra(d_model=8, headdim=4)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    _directions = 2

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            norm_before_gate=True,
            conv_bias=conv_bias,
            bias=bias,
            causal=False,
            device=device,
            dtype=dtype,
        )
        self.fc_D = nn.Linear(self.d_inner, self.nheads, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: Mamba2State | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        z, u, dt = self.in_proj(x).split([self.d_inner, self.conv1d.out_channels, 2 * self.nheads], -1)
        u, pair, pair_rev = self.conv1d(u, None, cu_seqlens, mask).split(
            [self.d_inner, self.pair_width, self.pair_width], -1
        )
        dt, dt_rev = dt.chunk(2, -1)
        B, C = self._pair(pair)
        B_rev, C_rev = self._pair(pair_rev)
        heads = u.unflatten(-1, (self.nheads, self.headdim))
        y = self.context.run(
            ssd_bidirectional,
            heads,
            dt,
            self.A_log,
            B,
            C,
            dt_rev=dt_rev,
            B_rev=B_rev,
            C_rev=C_rev,
            shift=True,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            A_is_log=True,
            cu_seqlens=cu_seqlens,
        )
        y = y + heads * (self.fc_D(u) + self.D).to(u.dtype).unsqueeze(-1)
        return self.out_proj(self.norm(y.flatten(-2), z))
