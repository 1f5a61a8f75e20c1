"""MatrixSSM: gated linear attention, a matrix state whose rows decay each at its own rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.mixer import Kept, Mixer, positive
from ssmscan.layers.norm import GatedRMSNorm
from ssmscan.layers.parameters import wide
from ssmscan.layers.start import check_memory, spread_decay_bias_
from ssmscan.layers.state import advance
from ssmscan.ops import matrix_scan, matrix_scan_step
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class MatrixSSMState(NamedTuple):
    """What a :class:`MatrixSSM` remembers: ``scan``, (b, hn, p), the rows of the matrices of all heads."""

    scan: Tensor


class MatrixSSM(Mixer):
    """A layer with a matrix for its state in each head, every row of which has a decay that depends on the input.

    .. math::
        (z, v, k, q, r) = W_{in} x, \\qquad a = \\sigma(r + b_a), \\\\
        H_t = \\mathrm{diag}(a_t) H_{t-1} + \\bigl( \\sqrt{1 - a_t^2} \\, k_t \\bigr) \\otimes v_t, \\qquad
        y = W_{out} \\, \\mathrm{rms}\\bigl( (q_t H_t / \\sqrt n) \\, \\mathrm{silu}(z_t) \\bigr)

    with d = expand · d_model channels in h = d / headdim heads. The factor of k keeps rows of any memory at one
    variance. At the start the rows of each head remember for 1 to 1000 tokens, evenly spread in the logarithm
    (``memory``).

    All states H are computed, n times the memory of x: this is the layer to study matrix states with, where the decay
    of a row matters. Where one decay for a head does, :class:`ssmscan.layers.Mamba2` is far quicker.

    Args:
        d_model: width m of the input and the output.
        d_state: rows n of a head's matrix. Default 16.
        expand: channels for each of d_model. Default 1.
        headdim: columns p of a head's matrix, a divisor of d. Default 64.
        memory: shortest and longest time constant at the start, in tokens. Default (1, 1000).
        norm_eps: epsilon of the norm, which each head has of its own. Default 1e-5.
        device, dtype: of the parameters; the bias of the decay is float32 or wider always.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state a :class:`MatrixSSMState`.

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), section 4.1.

    Example:
        >>> import torch
        >>> from ssmscan.layers import MatrixSSM
        >>> layer, x = MatrixSSM(d_model=8, headdim=4, d_state=2), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2)
        >>> chunks = torch.cat([layer(x[:, :3], state), layer(x[:, 3:], state)], 1)
        >>> torch.allclose(layer(x), chunks, atol=1e-5)
        True
    """

    _keep_wide = ("decay_bias",)
    _no_weight_decay = ("decay_bias",)

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 1,
        headdim: int = 64,
        memory: tuple[float, float] = (1.0, 1000.0),
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("MatrixSSM", d_model=d_model, d_state=d_state, expand=expand, headdim=headdim)
        check_memory("MatrixSSM", memory)
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.headdim = headdim
        if self.d_inner % headdim:
            raise ValueError(error("MatrixSSM", f"headdim must divide expand * d_model = {self.d_inner}", headdim))
        self.nheads = self.d_inner // headdim
        self.memory = memory
        self.rows = self.nheads * d_state
        # Rows [z, v, k, q, r].
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 3 * self.rows, bias=False, device=device, dtype=dtype)
        self.decay_bias = nn.Parameter(torch.empty(self.nheads, d_state, device=device, dtype=wide(dtype)))
        self.norm = GatedRMSNorm(self.d_inner, norm_eps, self.nheads, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projections anew and spread the rows' memories over ``memory``."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        spread_decay_bias_(self.decay_bias, self.memory)

    def state_layout(self) -> MatrixSSMState:
        return MatrixSSMState._make([Kept((self.rows, self.headdim), self.state_dtype())])

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: MatrixSSMState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        z, v, k, q, r = self.in_proj(x).split([self.d_inner] * 2 + [self.rows] * 3, -1)
        gate = r + self.decay_bias.flatten()
        # sqrt(1 - a²) as sqrt(1 - a) sqrt(1 + a), whose derivative stays finite as a reaches 1.
        scale = torch.exp((F.logsigmoid(-gate) + torch.log1p(torch.sigmoid(gate))) / 2)
        k = (k * scale).to(v.dtype).unflatten(-1, (self.nheads, self.d_state))
        v = v.unflatten(-1, (self.nheads, self.headdim))
        tokens = {"x": (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(2, 3), "log_a": F.logsigmoid(gate)}
        scan = None if state is None else state.scan
        H = advance(self.context, matrix_scan, matrix_scan_step, scan, cu_seqlens, tokens)
        H = H.unflatten(2, (self.nheads, self.d_state))
        q = q.unflatten(-1, (self.nheads, 1, self.d_state)) * self.d_state**-0.5
        return self.out_proj(self.norm((q @ H).flatten(-3), z))

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, headdim={self.headdim}"
        return f"{sizes}, memory={self.memory}"
