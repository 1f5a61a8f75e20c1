"""The decode step of causal_conv1d in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.causal_conv1d.configs import STEP


@kernel(do_not_specialize=[])
def causal_conv1d_token(
    x, weight, bias, h, y,
    D, x_batch, x_channel, h_batch, h_row, h_channel,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for one token of one batch row; the state moves up by a row, in place."""
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = channels < D
    column = channels.to(tl.int64)
    h += batch * h_batch + column * h_channel
    now = tl.load(x + batch * x_batch + column * x_channel, mask=inside).to(tl.float32)
    z = now * tl.load(weight + column * W + W - 1, mask=inside).to(tl.float32)
    for k in tl.static_range(W - 1):
        row = tl.load(h + k * h_row, mask=inside)
        z += row * tl.load(weight + column * W + k, mask=inside).to(tl.float32)
        if k > 0:
            tl.store(h + (k - 1) * h_row, row, mask=inside)
    tl.store(h + (W - 2) * h_row, now, mask=inside)
    if bias is not None:
        z += tl.load(bias + channels, mask=inside).to(tl.float32)
    if SILU:
        z *= sigmoid(z)
    tl.store(y + batch * D + channels, z.to(y.dtype.element_ty), mask=inside)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, silu: bool) -> Tensor:
    batch, d = x.shape
    y = x.new_empty(batch, d)
    if y.numel() > 0:
        causal_conv1d_token.launch(
            (batch * -(-d // STEP.BD), 1, 1),
            (x, weight.contiguous(), None if bias is None else bias.contiguous(), h, y),
            (d, *x.stride(), *h.stride()),
            (weight.shape[1], silu, STEP.BD),
            STEP.warps,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
