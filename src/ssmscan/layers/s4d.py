"""S4D: the diagonal state-space layer whose system does not depend on the input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.mixer import Kept, Mixer, positive
from ssmscan.layers.parameters import wide
from ssmscan.layers.start import check_steps
from ssmscan.layers.state import advance
from ssmscan.ops import s4d, s4d_step
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class S4DState(NamedTuple):
    """What an :class:`S4D` remembers: ``scan``, (b, m, n), complex64 with complex poles."""

    scan: Tensor


class S4D(Mixer):
    """A time-invariant diagonal state-space model for each channel, and a gated projection that mixes the channels.

    .. math::
        h_t = e^{\\Delta A} h_{t-1} + \\frac{e^{\\Delta A} - 1}{A} x_t, \\qquad
        s_t = 2 \\mathrm{Re}(C \\cdot h_t) + D x_t, \\qquad
        (v, g) = W_{out} \\, \\mathrm{gelu}(s), \\qquad y = v \\, \\sigma(g)

    (s = C · h + D x with real poles). The same system is a convolution with its impulse response;
    :func:`ssmscan.s4d` computes either form of :meth:`system`.

    Args:
        d_model: width m of the input and the output, each channel of which has n states.
        d_state: real numbers in the state of a channel: n complex poles, each with its conjugate, have 2n of them.
            Even, with complex poles. Default 64.
        poles: "lin", A = -1/2 + iπk for k from 0 (S4D-Lin); or "real", A = -1 … -n (S4D-Real). Default "lin".
        dt_min, dt_max: step sizes Δ at the start are drawn log-uniformly between them. Default 0.001 and 0.1.
        device, dtype: of the parameters; those of the system are float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state an :class:`S4DState`.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.

    Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022), sections 3 and 4;
    the layer around it is that of Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces" (2021).

    Example:
        >>> import torch
        >>> from ssmscan.layers import S4D
        >>> layer, x = S4D(d_model=8, d_state=4), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> with torch.no_grad():
        ...     steps = torch.cat([layer(x[:, t : t + 1], state) for t in range(5)], 1)
        >>> torch.allclose(layer(x), steps, atol=1e-5)
        True
    """

    _keep_wide = ("A_log", "A_imag", "C", "D", "log_dt")
    _no_weight_decay = ("A_log", "A_imag", "D", "log_dt")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        poles: Literal["lin", "real"] = "lin",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("S4D", d_model=d_model, d_state=d_state)
        check_steps("S4D", dt_min, dt_max)
        if poles not in ("lin", "real"):
            raise ValueError(error("S4D", 'poles must be "lin" or "real"', repr(poles)))
        if poles == "lin" and d_state % 2:
            raise ValueError(error("S4D", 'd_state must be even with poles="lin"', d_state))
        self.d_model = d_model
        self.complex = poles == "lin"
        self.n = d_state // 2 if self.complex else d_state
        self.dt_range = (dt_min, dt_max)
        real = wide(dtype)
        # A = -exp(A_log) + i·A_imag; the last axis of C has its real and its imaginary part.
        self.A_log = nn.Parameter(torch.empty(d_model, self.n, device=device, dtype=real))
        self.A_imag = nn.Parameter(torch.empty(d_model, self.n, device=device, dtype=real)) if self.complex else None
        self.C = nn.Parameter(torch.empty(d_model, self.n, 2 if self.complex else 1, device=device, dtype=real))
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=real))
        self.log_dt = nn.Parameter(torch.empty(d_model, device=device, dtype=real))
        # Rows [v, g].
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Poles at their places, C normal with variance 1, D = 1, step sizes and the projection drawn."""
        number = torch.ones_like(self.A_log).cumsum(1)
        if self.A_imag is None:
            self.A_log.copy_(number.log())
        else:
            self.A_log.fill_(math.log(0.5))
            self.A_imag.copy_(math.pi * (number - 1))
        nn.init.normal_(self.C, std=self.C.shape[-1] ** -0.5)
        nn.init.ones_(self.D)
        nn.init.uniform_(self.log_dt, math.log(self.dt_range[0]), math.log(self.dt_range[1]))
        self.out_proj.reset_parameters()

    def system(self) -> dict[str, Tensor]:
        """dt, A, B, C and D, as :func:`ssmscan.s4d` takes them."""
        # There is no complex number of two bfloat16, to which a sharding library may have narrowed them.
        real = self.state_dtype()
        A, C = -torch.exp(self.A_log.to(real)), self.C.to(real)
        if self.A_imag is None:
            C = C.squeeze(-1)
        else:
            A, C = torch.complex(A, self.A_imag.to(real)), torch.view_as_complex(C)
        return {"dt": torch.exp(self.log_dt), "A": A, "B": torch.ones_like(A), "C": C, "D": self.D}

    def state_layout(self) -> S4DState:
        dtype = self.state_dtype()
        if self.complex:
            dtype = torch.complex128 if dtype is torch.float64 else torch.complex64
        return S4DState._make([Kept((self.d_model, self.n), dtype)])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: S4DState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        scan = None if state is None else state.scan
        y = advance(self.context, s4d, s4d_step, scan, cu_seqlens, {"x": x}, **self.system())
        return F.glu(self.out_proj(F.gelu(y)), -1)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n={self.n}, poles={'lin' if self.complex else 'real'}"
