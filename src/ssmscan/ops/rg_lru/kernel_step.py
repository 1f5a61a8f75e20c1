"""The decode step of rg_lru in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.activation import sigmoid
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops.rg_lru.kernel_fwd import decay_and_gain, open_gate_rate

# Channels of a program; a thread takes four, 16 bytes of the state.
BD = 128
WARPS = 1


@kernel(do_not_specialize=[])
def rg_lru_token(
    x, input_gate, recurrence_gate, a_param, h, y,
    D, x_batch, x_channel, i_batch, i_channel, r_batch, r_channel, h_batch, h_channel,
    BD: tl.constexpr,
):  # fmt: skip
    """y for one token and BD channels of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(D, BD)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = channels < D
    column = channels.to(tl.int64)
    u = tl.load(x + batch * x_batch + column * x_channel, mask=inside, other=0.0).to(tl.float32)
    i = tl.load(input_gate + batch * i_batch + column * i_channel, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(recurrence_gate + batch * r_batch + column * r_channel, mask=inside, other=0.0).to(tl.float32)
    state = h + batch * h_batch + column * h_channel
    a, gain, _ = decay_and_gain(sigmoid(r), open_gate_rate(a_param, channels, D))
    now = a * tl.load(state, mask=inside, other=0.0) + gain * (sigmoid(i) * u)
    tl.store(state, now, mask=inside)
    tl.store(y + batch * D + channels, now.to(y.dtype.element_ty), mask=inside)


def step(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, a_param: Tensor, h: Tensor) -> Tensor:
    batch, d = x.shape
    y = x.new_empty(batch, d)
    if y.numel() > 0:
        rg_lru_token.launch(
            (batch * -(-d // BD), 1, 1),
            (x, input_gate, recurrence_gate, a_param.contiguous(), h, y),
            (d, *x.stride(), *input_gate.stride(), *recurrence_gate.stride(), *h.stride()),
            (BD,),
            WARPS,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
