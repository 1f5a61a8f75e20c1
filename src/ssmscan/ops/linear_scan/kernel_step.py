"""The decode step of linear_scan in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel

# Channels of a program; a thread takes four, 16 bytes of the state.
BD = 128
WARPS = 1


@kernel(do_not_specialize=["L", "rows"])
def linear_scan_tokens(
    x, a, b, c, h, state_indices, y,
    L, rows, D, x_batch, x_time, x_channel, a_batch, a_time, a_channel, b_batch, b_time, b_channel,
    c_batch, c_time, c_channel, h_row, h_channel,
    LOG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for L tokens and BD channels of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row, taken = pool_row(state_indices, batch, rows)
    inside = channels < D
    column = channels.to(tl.int64)
    pointers = h + row * h_row + column * h_channel
    state = tl.load(pointers, mask=inside & taken, other=0.0)
    for t in range(L):
        time = tl.cast(t, tl.int64)
        u = tl.load(x + batch * x_batch + time * x_time + column * x_channel, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(a + batch * a_batch + time * a_time + column * a_channel, mask=inside, other=0.0)
        decay = decay.to(tl.float32)
        if LOG:
            decay = tl.exp(decay)
        if b is not None:
            gate = tl.load(b + batch * b_batch + time * b_time + column * b_channel, mask=inside, other=0.0)
            u *= gate.to(tl.float32)
        # Spelled out, to round as the scan does.
        now = tl.fma(decay, state.to(tl.float32), u)
        out = now
        if c is not None:
            gate = tl.load(c + batch * c_batch + time * c_time + column * c_channel, mask=inside, other=0.0)
            out *= gate.to(tl.float32)
        out = tl.where(taken, out, 0.0)
        tl.store(y + (batch * L + t) * D + channels, out.to(y.dtype.element_ty), mask=inside)
        state = now.to(h.dtype.element_ty)
    tl.store(pointers, state, mask=inside & taken)


def step(
    x: Tensor, decay: Tensor, b: Tensor | None, c: Tensor | None, h: Tensor, state_indices: Tensor | None, log: bool
) -> Tensor:
    batch, d = x.shape[0], x.shape[-1]
    return launch(
        linear_scan_tokens,
        batch * -(-d // BD),
        x.shape[1] if x.dim() == 3 else 1,
        (x, decay, b, c),
        h,
        state_indices,
        (d, *token_strides(3, x, decay, b, c), *h.stride()),
        (log, BD),
        WARPS,
    )
