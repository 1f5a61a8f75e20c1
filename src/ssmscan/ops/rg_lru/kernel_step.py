"""The decode step of rg_lru in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.rg_lru.kernel_fwd import decay_and_gain, open_gate_rate

# Channels of a program; a thread takes four, 16 bytes of the state.
BD = 128
WARPS = 1


@kernel(do_not_specialize=["L", "rows"])
def rg_lru_tokens(
    x, input_gate, recurrence_gate, a_param, h, state_indices, y,
    L, rows, D, x_batch, x_time, x_channel, i_batch, i_time, i_channel, r_batch, r_time, r_channel, h_row, h_channel,
    BD: tl.constexpr,
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
    rate = open_gate_rate(a_param, channels, D)
    x += batch * x_batch + column * x_channel
    input_gate += batch * i_batch + column * i_channel
    recurrence_gate += batch * r_batch + column * r_channel
    for t in range(L):
        time = tl.cast(t, tl.int64)
        u = tl.load(x + time * x_time, mask=inside, other=0.0).to(tl.float32)
        i = tl.load(input_gate + time * i_time, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(recurrence_gate + time * r_time, mask=inside, other=0.0).to(tl.float32)
        a, gain, _ = decay_and_gain(sigmoid(r), rate)
        # Spelled out, to round as the scan does.
        now = tl.fma(a, state.to(tl.float32), gain * (sigmoid(i) * u))
        out = tl.where(taken, now, 0.0)
        tl.store(y + (batch * L + t) * D + channels, out.to(y.dtype.element_ty), mask=inside)
        state = now.to(h.dtype.element_ty)
    tl.store(pointers, state, mask=inside & taken)


def step(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, a_param: Tensor, h: Tensor, state_indices: Tensor | None
) -> Tensor:
    batch, d = x.shape[0], x.shape[-1]
    return launch(
        rg_lru_tokens,
        batch * -(-d // BD),
        x.shape[1] if x.dim() == 3 else 1,
        (x, input_gate, recurrence_gate, a_param.contiguous()),
        h,
        state_indices,
        (d, *token_strides(3, x, input_gate, recurrence_gate), *h.stride()),
        (BD,),
        WARPS,
    )
