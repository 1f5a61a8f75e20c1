"""Attention: causal softmax attention with rotary positions, for hybrids and baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan.layers.conv import ShortConv
from ssmscan.layers.mixer import Kept, Mixer, no_state, positive
from ssmscan.layers.state import write
from ssmscan.ops import linear_scan
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class AttentionState(NamedTuple):
    """What an :class:`Attention` remembers: all keys and values.

    ``conv``, (b, w-1, d), the last inputs of the convolution, empty without one; ``keys`` and ``values``,
    (b, max_length + 1, g, p), where padding is written to the last place; ``length``, (b,) int64, tokens so far.
    """

    conv: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor


class Attention(Mixer):
    """Softmax attention: every token takes a weighted mean of the values before it.

    .. math::
        (q, k, v) = W_{in} x, \\qquad
        y_t = W_{out} \\sum_{j \\le t} \\frac{e^{q_t R_{t-j} k_j / \\sqrt p}}
            {\\sum_{i \\le t} e^{q_t R_{t-i} k_i / \\sqrt p}} \\, v_j

    in each of ``num_heads`` heads; R turns the first ``rotary_emb_dim`` channels of a head by angles that grow with the
    distance. Heads in groups may share their keys and values.

    Args:
        d_model: width m of the input and the output.
        num_heads: heads of queries.
        num_heads_kv: heads g of keys and values, a divisor of num_heads; None is num_heads.
        head_dim: channels p of a head; None is d_model / num_heads.
        rotary_emb_dim: channels of a head that are turned, even; None is all, 0 none.
        rotary_emb_base: the slowest channels turn once in 2π times this many tokens. Default 10000.
        window: a token sees the last ``window`` tokens, itself included; None is all.
        d_conv: width of a short convolution over q, k and v; 0 is none. Default 0.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias. Default False.
        causal: whether a token sees only those before it. Default True.
        device, dtype: of the parameters; None is PyTorch's default.

    The forward is that of :class:`ssmscan.layers.Mixer`, the state an :class:`AttentionState`, which holds keys and
    values in the dtype of the projection. ``init_state`` needs ``max_length``. More tokens than that are refused on the
    CPU; on a GPU, which is not waited for, the outputs of such tokens are NaN.

    Without window, mask, packing and state PyTorch's fused attention is told that it is causal; otherwise it is given
    a mask of (queries, keys).

    Raises:
        TypeError: x is not a floating tensor, or a state not what :meth:`init_state` makes.
        ValueError: a wrong argument or shape, or more tokens than a state can hold.
        NotImplementedError: a state with ``causal=False``.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2; Su et al., "RoFormer" (2021), section 3.4; Ainslie
    et al., "GQA" (2023), section 2.

    Example:
        >>> import torch
        >>> from ssmscan.layers import Attention
        >>> layer, x = Attention(d_model=8, num_heads=2), torch.randn(2, 5, 8)
        >>> state = layer.init_state(2, max_length=16)
        >>> chunks = torch.cat([layer(x[:, :3], state), layer(x[:, 3:], state)], 1)
        >>> torch.allclose(layer(x), chunks, atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        rotary_emb_dim: int | None = None,
        rotary_emb_base: float = 10000.0,
        window: int | None = None,
        d_conv: int = 0,
        qkv_proj_bias: bool = False,
        out_proj_bias: bool = False,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("Attention", d_model=d_model, num_heads=num_heads)
        if head_dim is None and d_model % num_heads:
            raise ValueError(error("Attention", f"num_heads must divide d_model = {d_model}", num_heads))
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.rotary_emb_dim = self.head_dim if rotary_emb_dim is None else rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.window = window
        self.causal = causal
        positive("Attention", num_heads_kv=self.num_heads_kv, head_dim=self.head_dim)
        if num_heads % self.num_heads_kv:
            raise ValueError(error("Attention", f"num_heads_kv must divide num_heads = {num_heads}", num_heads_kv))
        if self.rotary_emb_dim % 2 or not 0 <= self.rotary_emb_dim <= self.head_dim:
            rule = f"rotary_emb_dim must be even and at most head_dim = {self.head_dim}"
            raise ValueError(error("Attention", rule, self.rotary_emb_dim))
        if window is not None:
            positive("Attention", window=window)
        # Rows [q, k, v].
        self.rows = (num_heads + 2 * self.num_heads_kv) * self.head_dim
        self.in_proj = nn.Linear(d_model, self.rows, bias=qkv_proj_bias, device=device, dtype=dtype)
        self.conv1d = None
        if d_conv:
            self.conv1d = ShortConv(self.rows, d_conv, activation=None, centred=not causal, device=device, dtype=dtype)
        self.out_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=out_proj_bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]

    def reference_parameter(self) -> nn.Parameter:
        return next(self.in_proj.parameters())

    def state_layout(self) -> AttentionState:
        if not self.causal:
            raise NotImplementedError(no_state(type(self).__name__))
        dtype = self.state_dtype()
        conv = Kept((0, self.rows), dtype) if self.conv1d is None else self.conv1d.kept(dtype)
        stored = self.stored_dtype()
        pairs = Kept((-1, self.num_heads_kv, self.head_dim), stored if stored.is_floating_point else dtype)
        return AttentionState._make([conv, pairs, pairs, Kept((), torch.int64)])

    def init_state(self, batch_size: int, max_length: int | None = None) -> AttentionState:
        """The state before the first token of ``batch_size`` sequences of at most ``max_length`` tokens."""
        # The place for padding.
        return super().init_state(batch_size, None if max_length is None else max_length + 1)

    def forward(
        self,
        x: Float[Tensor, "b l m"],
        state: AttentionState | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b l m"]:
        x = self.enter(x, state, cu_seqlens, mask)
        # Keys, values and places are those of the whole sequence, queries those of the tokens here.
        before, total = self.context.extent(x.shape[1], x.device)
        here = slice(before, before + x.shape[1])
        every = None if mask is None else self.context.gather(mask.to(torch.uint8)).bool()
        sequence, position, poison = _places(x, total, cu_seqlens, every)
        if state is not None:
            position = position + state.length[sequence]
            _check_length(position, every, state)
        qkv = self.in_proj(x)
        if self.conv1d is not None:
            qkv = self.conv1d(qkv, None if state is None else state.conv, cu_seqlens, mask)
        heads, groups = self.num_heads, self.num_heads_kv
        qk, v = qkv.unflatten(-1, (-1, self.head_dim)).split([heads + groups, groups], -2)
        q, k = self._rotate(qk, position[:, here]).split([heads, groups], -2)
        k, v = self.context.gather(k), self.context.gather(v)
        if state is None and cu_seqlens is not None and self._flash(q):
            y = self._attend_packed(q, k, v, cu_seqlens)
        elif state is None:
            y = self._attend(q, k, v, self._visible(sequence, position, here, cu_seqlens, every))
        else:
            y = self._continue(q, k, v, state, sequence, position, here, cu_seqlens, every)
        return self.out_proj(y.flatten(-2) if poison is None else y.flatten(-2) + poison[:, here])

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn channel i with channel i + r/2 of each head, where r is ``rotary_emb_dim``."""
        r = self.rotary_emb_dim
        wide = torch.promote_types(x.dtype, torch.float32)
        rate = self.rotary_emb_base ** (-torch.arange(0, r, 2, device=x.device, dtype=wide) / max(r, 1))
        angle = position[..., None, None] * rate
        cos, sin = angle.cos(), angle.sin()
        first, second = x[..., :r].to(wide).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([turned.to(x.dtype), x[..., r:]], -1)

    def _visible(
        self, sequence: Tensor, position: Tensor, here: slice, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Which tokens of the sequence each token here sees, (b, l, total); None is all, or all before it."""
        if self.window is None and cu_seqlens is None and mask is None and not self.context.split:
            return None
        distance = position[:, here].unsqueeze(2) - position.unsqueeze(1)
        visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            visible = visible & (distance.abs() < self.window)
        if cu_seqlens is not None:
            visible = visible & (sequence[:, here].unsqueeze(2) == sequence.unsqueeze(1))
        if mask is not None:
            # Padding sees itself, for a softmax of nothing is not a number.
            itself = torch.eye(mask.shape[1], device=mask.device, dtype=torch.bool)[here]
            visible = (visible & mask.unsqueeze(1)) | itself
        return visible

    def _continue(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AttentionState,
        sequence: Tensor,
        position: Tensor,
        here: slice,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Add keys and values to the state, and attend over all of it."""
        rows, places = state.keys.shape[:2]
        spare = places - 1
        place = position.clamp(0, spare)
        if mask is not None:
            place = torch.where(mask, place, spare)
        keys = write(state.keys, (sequence, place), k)
        values = write(state.values, (sequence, place), v)
        if cu_seqlens is not None:
            state.length.add_(cu_seqlens.diff())
        else:
            state.length.add_(k.shape[1] if mask is None else mask.sum(1))
        at = torch.arange(places, device=position.device)
        end = position[:, here].unsqueeze(2)
        visible = at <= end if self.window is None else (at <= end) & (at > end - self.window)
        if cu_seqlens is not None:
            # One row of queries meets the keys of all sequences.
            own = sequence[:, here].unsqueeze(2) == torch.arange(rows, device=position.device)
            visible = (own.unsqueeze(3) & visible.unsqueeze(2)).flatten(2)
            keys, values = (memory.flatten(0, 1).unsqueeze(0) for memory in (keys, values))
        y = self._attend(q, keys, values, visible)
        return y.masked_fill((position[:, here] >= spare)[..., None, None], torch.nan)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """The values that each query sees, weighted: (b, l, h, p) from q (b, l, h, p) and k and v (b, j, g, p)."""
        k, v = (part.to(q.dtype).transpose(1, 2) for part in (k, v))
        if visible is None:
            shared = self.num_heads != self.num_heads_kv
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=self.causal, enable_gqa=shared)
            return y.transpose(1, 2)
        # With a mask few kernels know of shared keys: heads that share them become one with as many times the queries.
        sharing = self.num_heads // self.num_heads_kv
        q = q.unflatten(2, (-1, sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, visible.repeat(1, sharing, 1).unsqueeze(1))
        return y.unflatten(2, (sharing, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _flash(self, q: Tensor) -> bool:
        """Whether PyTorch has a kernel for packed sequences of such queries, which needs no (l, l) mask."""
        fits = q.dtype in (torch.float16, torch.bfloat16) and self.head_dim % 8 == 0 and self.head_dim <= 256
        return q.is_cuda and fits and not self.context.split

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        l = q.shape[1]
        # Within the tokens whatever they are: outputs of bad bounds are NaN already.
        bounds = cu_seqlens.clamp(0, l).cummax(0).values.to(torch.int32)
        sharing = self.num_heads // self.num_heads_kv
        k, v = (part.to(q.dtype)[0].repeat_interleave(sharing, 1) for part in (k, v))
        before = -1 if self.window is None else self.window - 1
        window = (before, 0 if self.causal else before)
        y = varlen_attn(q[0], k, v, bounds, bounds, l, l, window_size=window)
        return cast(Tensor, y).unsqueeze(0)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, head_dim={self.head_dim}"
        return f"d_model={self.d_model}, {heads}, rotary_emb_dim={self.rotary_emb_dim}, window={self.window}"


def _check_length(position: Tensor, mask: Tensor | None, state: AttentionState) -> None:
    """Refuse more tokens than a state can hold, where their number can be read without waiting for a device."""
    if not position.is_cpu or torch.compiler.is_compiling():
        return
    longest = state.keys.shape[1] - 1
    beyond = position >= longest if mask is None else (position >= longest) & mask
    if beyond.any():
        rule = f"a sequence must have at most max_length = {longest} tokens"
        raise ValueError(error("Attention", rule, int(position[beyond].max()) + 1, "Make a longer state."))


def _places(
    x: Tensor, total: int, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of all tokens the sequence and the place in it, (b, total) if broadcast; what bad bounds turn outputs into."""
    b = x.shape[0]
    token = torch.arange(total, device=x.device)
    if cu_seqlens is not None:
        # A scan of zeros refuses bad bounds, and is NaN for those that could not be read.
        nothing = x.new_zeros(b, total, 1)
        poison, _ = linear_scan(nothing, nothing, cu_seqlens=cu_seqlens)
        last = max(cu_seqlens.shape[0] - 2, 0)
        sequence = torch.searchsorted(cu_seqlens[1:], token.to(cu_seqlens.dtype), right=True).clamp(max=last)
        return sequence.unsqueeze(0), (token - cu_seqlens[sequence]).unsqueeze(0), poison
    sequence = torch.arange(b, device=x.device).unsqueeze(1)
    if mask is None:
        return sequence, token.unsqueeze(0), None
    return sequence, (mask.cumsum(1) - 1).clamp(min=0), None
