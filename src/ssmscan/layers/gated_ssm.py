"""GatedSSM: a residual block around one gated diagonal scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.norm import RMSNorm
from ssmscan.layers.precision import keep_wide
from ssmscan.ops import linear_scan, linear_scan_step
from ssmscan.shapes import check_rank, check_state, check_tensors, error

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class GatedSSMState(NamedTuple):
    """What a :class:`GatedSSM` remembers: ``h``, (b, d), the state of its scan in float32."""

    h: Tensor


class GatedSSM(nn.Module):
    """A gated diagonal state-space layer: norm, input-dependent gates, scan, output gate, projection, residual.

    .. math::
        u = \\mathrm{norm}(x), \\qquad (v, i, o, r) = W_{in} u, \\\\
        a = \\sigma(r + b_a), \\quad b = \\sigma(i + b_b), \\quad c = \\mathrm{silu}(o), \\\\
        h_t = a_t h_{t-1} + b_t v_t, \\qquad y = x + W_{out} (c_t h_t)

    The decay reaches the scan as the logarithm ``log σ(r + b_a)`` in float32, for bfloat16 rounds 0.999 to 1.

    At the start the channels remember for 1 to 1000 tokens, evenly spread in the logarithm (``memory``): the time
    constant τ of a channel gives a = exp(-1/τ), hence b_a = -log(expm1(1/τ)). A uniform spread of the bias would leave
    nearly all channels with a memory of a few tokens, and a gradient cannot find what was forgotten. The input gate
    starts at b = sqrt(1 - a²), so that every channel has the same variance whatever its memory.

    Args:
        hidden_size: width m of the input and the output.
        state_size_mult: the scan has d = hidden_size * state_size_mult channels. An integer factor, not the state size
            itself. Default 4.
        eps: of the norm. Default 1e-6.
        dtype: dtype of the parameters; None is PyTorch's default. The two gate biases are float32 or wider always,
            and are not to be weight-decayed (``_no_weight_decay``).
        compute_dtype: dtype of the projections and of the scan's v, b and c; None is that of the parameters. Under
            autocast, autocast decides. The decay, the state and the norm are float32 or wider always.
        use_residual: add x to the output. Default True.
        use_norm: normalise the input. Default True.
        memory: shortest and longest time constant at the start, in tokens. Default (1, 1000).

    The forward takes

    - x: (b, l, m), any floating dtype;
    - state: None (zeros), or what :meth:`init_state` made. It is read first and overwritten with the state after the
      last token, for a single token as for a chunk of any length. The new state carries no gradient;
    - cu_seqlens: bounds of s packed sequences, as in :func:`ssmscan.linear_scan`; the state is then that of s rows;

    and returns y, (b, l, m), in x's dtype.

    Raises:
        TypeError: x is not a floating tensor, or a state not float32.
        ValueError: a wrong argument or shape.

    The layer is the gated SSM of Blouir et al., "Birdie: Advancing State Space Models with Reward-Driven Objectives
    and Curricula" (2024). Time constants spread in the logarithm are those of S4, see Gu et al., "How to Train Your
    HiPPO" (2022); the scale of the input gate is that of Orvieto et al., "Resurrecting Recurrent Neural Networks for
    Long Sequences" (2023), section 3.4.

    Example:
        >>> import torch
        >>> from ssmscan.layers import GatedSSM
        >>> layer, x = GatedSSM(hidden_size=8), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> steps = torch.cat([layer(x[:, t : t + 1], state) for t in range(5)], 1)
        >>> torch.allclose(layer(x), steps, atol=1e-5)
        True
    """

    def __init__(
        self,
        hidden_size: int,
        state_size_mult: int = 4,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        use_residual: bool = True,
        use_norm: bool = True,
        memory: tuple[float, float] = (1.0, 1000.0),
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("state_size_mult", state_size_mult)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(error("GatedSSM", f"{name} must be a positive integer", value))
        if not 0 < memory[0] <= memory[1]:
            raise ValueError(error("GatedSSM", "memory must be a positive, non-decreasing pair", memory))
        self.hidden_size = hidden_size
        self.state_size = hidden_size * state_size_mult
        self.compute_dtype = compute_dtype
        self.use_residual = use_residual
        self.memory = memory
        self.norm = RMSNorm(hidden_size, eps, dtype) if use_norm else nn.Identity()
        # Rows [v, i, o, r].
        self.in_proj = nn.Linear(hidden_size, 4 * self.state_size, bias=False, dtype=dtype)
        self.out_proj = nn.Linear(self.state_size, hidden_size, bias=False, dtype=dtype)
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        self.decay_bias = nn.Parameter(torch.empty(self.state_size, dtype=wide))
        self.input_bias = nn.Parameter(torch.empty(self.state_size, dtype=wide))
        for bias in (self.decay_bias, self.input_bias):
            bias._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projections anew and spread the channels' memories over ``memory``."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        shortest, longest = (torch.tensor(tau, dtype=torch.float64).log().item() for tau in self.memory)
        tau = torch.linspace(shortest, longest, self.state_size, dtype=torch.float64).exp()
        self.decay_bias.copy_(-torch.expm1(1 / tau).log())
        self.input_bias.copy_(torch.logit(torch.sqrt(-torch.expm1(-2 / tau))))

    def init_state(self, batch_size: int) -> GatedSSMState:
        """The state before the first token: zeros, for ``batch_size`` sequences."""
        return GatedSSMState(self.decay_bias.new_zeros(batch_size, self.state_size, requires_grad=False))

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: GatedSSMState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        self._check(x, state, cu_seqlens)
        dtype = self.in_proj.weight.dtype if self.compute_dtype is None else self.compute_dtype
        u = self.norm(x).to(dtype)
        v, i, o, r = F.linear(u, self.in_proj.weight.to(dtype)).chunk(4, -1)
        log_a = F.logsigmoid(r + self.decay_bias)
        b = torch.sigmoid(i + self.input_bias).to(v.dtype)
        c = F.silu(o)
        if state is None:
            y, _ = linear_scan(v, b=b, c=c, log_a=log_a, cu_seqlens=cu_seqlens)
        elif x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            v, b, c, log_a = (t.squeeze(1) for t in (v, b, c, log_a))
            y = linear_scan_step(v, b=b, c=c, log_a=log_a, h=state.h).unsqueeze(1)
        else:
            # The backward needs the state that was read, so the scan reads a copy.
            y, h = linear_scan(v, b=b, c=c, log_a=log_a, h0=state.h.clone(), cu_seqlens=cu_seqlens)
            with torch.no_grad():
                state.h.copy_(h)
        y = F.linear(y, self.out_proj.weight.to(dtype)).to(x.dtype)
        return x + y if self.use_residual else y

    def _check(self, x: Tensor, state: GatedSSMState | None, cu_seqlens: Tensor | None) -> None:
        check_tensors("GatedSSM", {"x": x})
        check_rank("GatedSSM", "x", x, "b, l, m")
        if x.shape[2] != self.hidden_size:
            raise ValueError(
                error("GatedSSM", f"x must have shape (b, l, m) with m = {self.hidden_size}", tuple(x.shape))
            )
        if state is not None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            axes = "b, d" if cu_seqlens is None else "s, d"
            check_state("GatedSSM", "state.h", state.h, axes, (rows, self.state_size), self.decay_bias.dtype)

    def _apply(self, fn, recurse=True):
        return super()._apply(keep_wide(fn, self.decay_bias, self.input_bias), recurse)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, state_size={self.state_size}, memory={self.memory}"
