"""RGLRU: Griffin's recurrent block around a gated linear recurrent unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.conv import ShortConv
from ssmscan.layers.mixer import Kept, Mixer, positive
from ssmscan.layers.parameters import WideParameters, wide
from ssmscan.layers.state import advance
from ssmscan.ops import rg_lru, rg_lru_step
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class RGLRUState(NamedTuple):
    """What an :class:`RGLRU` remembers: ``conv``, (b, w-1, d), its last inputs; ``scan``, (b, d)."""

    conv: Tensor
    scan: Tensor


class BlockDiagonalLinear(WideParameters):
    """A linear layer in which each of ``num_heads`` blocks of channels sees only itself. Its bias stays float32.

    The forward takes x, (..., d), and returns (..., d) in the wider of x's and the bias' dtype.
    """

    _keep_wide = ("bias",)
    _no_weight_decay = ("bias",)

    def __init__(
        self,
        channels: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = channels // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, width, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, width, device=device, dtype=wide(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of variance 0.01 over the inputs of a block, and no bias: a gate that is half open."""
        nn.init.normal_(self.weight, std=math.sqrt(0.01 / self.weight.shape[1]))
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        heads = x.unflatten(-1, self.bias.shape)
        return (torch.einsum("...hi,hij->...hj", heads, self.weight) + self.bias).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, num_heads={self.bias.shape[0]}"


class RGLRU(Mixer):
    """Griffin's recurrent block: a short convolution and a real-gated linear recurrent unit, beside a GeLU branch.

    .. math::
        (u, g) = W_{in} x + b_{in}, \\qquad u' = \\mathrm{conv}(u), \\qquad
        i = \\sigma(W_i u' + b_i), \\quad r = \\sigma(W_r u' + b_r), \\\\
        \\log a = -8 \\, r \\, \\mathrm{softplus}(\\Lambda), \\quad
        h_t = a_t h_{t-1} + \\sqrt{1 - a_t^2} \\; i_t u'_t, \\quad
        y = W_{out} (\\mathrm{gelu}(g_t) \\, h_t) + b_{out}

    W_i and W_r are block-diagonal.

    Args:
        d_model: width m of the input and the output.
        lru_width: channels d of the recurrence; None is d_model.
        num_heads: blocks of W_i and W_r, a divisor of d. Default 16.
        d_conv: width w of the convolution, 2 to 8. Default 4.
        a_range: a channel's a at the start, for softplus(Λ) = -log a: a² is drawn uniformly between the squares of
            these two. Default (0.9, 0.999).
        device, dtype: of the parameters; Λ (``a_param``) and the biases of the gates are float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state an :class:`RGLRUState`. The first token is as any
    other: the published code leaves the factor sqrt(1 - a²) out there.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.

    De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (2024), sections 2.3 and 2.4.

    Example:
        >>> import torch
        >>> from ssmscan.layers import RGLRU
        >>> layer, x = RGLRU(d_model=8, num_heads=2), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> chunks = torch.cat([layer(x[:, :3], state), layer(x[:, 3:], state)], 1)
        >>> torch.allclose(layer(x), chunks, atol=1e-5)
        True
    """

    _keep_wide = ("a_param",)
    _no_weight_decay = ("a_param",)

    def __init__(
        self,
        d_model: int,
        lru_width: int | None = None,
        num_heads: int = 16,
        d_conv: int = 4,
        a_range: tuple[float, float] = (0.9, 0.999),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_inner = d_model if lru_width is None else lru_width
        positive("RGLRU", d_model=d_model, lru_width=self.d_inner, num_heads=num_heads)
        if self.d_inner % num_heads:
            raise ValueError(error("RGLRU", f"num_heads must divide lru_width = {self.d_inner}", num_heads))
        if not 0 < a_range[0] <= a_range[1] < 1:
            raise ValueError(error("RGLRU", "a_range must be a non-decreasing pair between 0 and 1", a_range))
        self.a_range = a_range
        # Rows [u, g].
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, device=device, dtype=dtype)
        self.conv1d = ShortConv(self.d_inner, d_conv, activation=None, device=device, dtype=dtype)
        self.input_gate = BlockDiagonalLinear(self.d_inner, num_heads, device, dtype)
        self.recurrence_gate = BlockDiagonalLinear(self.d_inner, num_heads, device, dtype)
        self.a_param = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide(dtype)))
        self.out_proj = nn.Linear(self.d_inner, d_model, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew: normal weights that keep the variance (the convolution's are small), no biases."""
        nn.init.normal_(self.in_proj.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.conv1d.weight, std=0.1 * self.conv1d.kernel_size[0] ** -0.5)
        nn.init.normal_(self.out_proj.weight, std=self.d_inner**-0.5)
        for part in (self.in_proj, self.conv1d, self.out_proj):
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        self.input_gate.reset_parameters()
        self.recurrence_gate.reset_parameters()
        least, largest = self.a_range
        log_a = torch.empty_like(self.a_param).uniform_(least**2, largest**2).log() / 2
        # The inverse of softplus at -log a.
        self.a_param.copy_(torch.expm1(-log_a).log())

    def state_layout(self) -> RGLRUState:
        dtype = self.state_dtype()
        return RGLRUState._make([self.conv1d.kept(dtype), Kept((self.d_inner,), dtype)])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: RGLRUState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        conv, scan = state or (None, None)
        u, g = self.in_proj(x).chunk(2, -1)
        u = self.conv1d(u, conv, cu_seqlens, mask)
        tokens = {"x": u, "input_gate": self.input_gate(u), "recurrence_gate": self.recurrence_gate(u)}
        y = advance(self.context, rg_lru, rg_lru_step, scan, cu_seqlens, tokens, a_param=self.a_param)
        return self.out_proj(F.gelu(g, approximate="tanh") * y)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, lru_width={self.d_inner}"
