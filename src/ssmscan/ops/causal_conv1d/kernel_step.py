"""The decode step of causal_conv1d in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.causal_conv1d.configs import STEP
from ssmscan.ops.causal_conv1d.kernel_fwd import load_taps


@kernel(do_not_specialize=["L", "states"])
def causal_conv1d_tokens(
    x, weight, bias, h, state_indices, y,
    L, states, D, x_batch, x_time, x_channel, h_state, h_row, h_channel,
    W: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for L tokens and BD channels of one batch row; the ROWS of the state move up by one for each, in place."""
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    number, taken = pool_row(state_indices, batch, states)
    inside = channels < D
    column = channels.to(tl.int64)
    h += number * h_state + column * h_channel
    before = ()
    for k in tl.static_range(ROWS):
        before = before + (tl.load(h + k * h_row, mask=inside & taken, other=0.0),)
    taps, offset = load_taps(weight, bias, channels, D, W, BD)
    for t in range(L):
        time = tl.cast(t, tl.int64)
        now = tl.load(x + batch * x_batch + time * x_time + column * x_channel, mask=inside, other=0.0).to(tl.float32)
        z = offset
        for k in tl.static_range(W - 1):
            z += taps[k] * before[ROWS - W + 1 + k].to(tl.float32)
        z += taps[W - 1] * now
        if SILU:
            z *= sigmoid(z)
        z = tl.where(taken, z, 0.0)
        tl.store(y + (batch * L + t) * D + channels, z.to(y.dtype.element_ty), mask=inside)
        before = before[1:] + (now.to(h.dtype.element_ty),)
    for k in tl.static_range(ROWS):
        tl.store(h + k * h_row, before[k], mask=inside & taken)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, state_indices: Tensor | None, silu: bool) -> Tensor:
    batch, d = x.shape[0], x.shape[-1]
    return launch(
        causal_conv1d_tokens,
        batch * -(-d // STEP.BD),
        x.shape[1] if x.dim() == 3 else 1,
        (x, weight.contiguous(), None if bias is None else bias.contiguous()),
        h,
        state_indices,
        (d, *token_strides(3, x), *h.stride()),
        (weight.shape[1], h.shape[1], silu, STEP.BD),
        STEP.warps,
    )
