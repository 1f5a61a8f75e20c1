"""The decode step of linear_scan in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.launch import kernel

# Channels of a program; a thread takes four, 16 bytes of the state.
BD = 128
WARPS = 1


@kernel(do_not_specialize=[])
def linear_scan_token(
    x, a, b, c, h, y,
    D, x_batch, x_channel, a_batch, a_channel, b_batch, b_channel, c_batch, c_channel, h_batch, h_channel,
    LOG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for one token and BD channels of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = channels < D
    column = channels.to(tl.int64)
    u = tl.load(x + batch * x_batch + column * x_channel, mask=inside, other=0.0).to(tl.float32)
    decay = tl.load(a + batch * a_batch + column * a_channel, mask=inside, other=0.0).to(tl.float32)
    if LOG:
        decay = tl.exp(decay)
    if b is not None:
        u *= tl.load(b + batch * b_batch + column * b_channel, mask=inside, other=0.0).to(tl.float32)
    state = h + batch * h_batch + column * h_channel
    # Spelled out, to round as the scan does.
    now = tl.fma(decay, tl.load(state, mask=inside, other=0.0), u)
    out = now
    if c is not None:
        out *= tl.load(c + batch * c_batch + column * c_channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(state, now, mask=inside)
    tl.store(y + batch * D + channels, out.to(y.dtype.element_ty), mask=inside)


def step(x: Tensor, decay: Tensor, b: Tensor | None, c: Tensor | None, h: Tensor, log: bool) -> Tensor:
    batch, d = x.shape
    y = x.new_empty(batch, d)
    if y.numel() > 0:
        b_strides, c_strides = ((0, 0) if t is None else t.stride() for t in (b, c))
        linear_scan_token.launch(
            (batch * -(-d // BD), 1, 1),
            (x, decay, b, c, h, y),
            (d, *x.stride(), *decay.stride(), *b_strides, *c_strides, *h.stride()),
            (log, BD),
            WARPS,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
