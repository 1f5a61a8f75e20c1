"""The decode step of ssd in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.activation import exp, sigmoid, softplus
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops.ssd.tiles import bounded

# States of a program, over its channels; a thread takes sixteen, four times 16 bytes.
STATES = 2048
WARPS = 4


@kernel(do_not_specialize=[])
def ssd_token(
    x, dt, A, B, C, D, z, dt_bias, h, y,
    heads, p, n, per_group, x_batch, x_head, x_channel, dt_batch, dt_head, B_batch, B_group, B_state,
    C_batch, C_group, C_state, D_head, D_channel, z_batch, z_head, z_channel, h_batch, h_head, h_channel, h_state,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, N: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y for one token and BP channels of one head of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(p, BP)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    group = head // per_group
    channels = (tl.program_id(0) % blocks * BP + tl.arange(0, BP)).to(tl.int64)
    inside = channels < p
    states = tl.arange(0, N).to(tl.int64)
    known = states < n
    mask = inside[:, None] & known[None, :]

    delta = tl.load(dt + batch * dt_batch + head * dt_head).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    delta = bounded(delta, LOW, HIGH)
    decay = exp(delta * tl.load(A + head).to(tl.float32))
    u = tl.load(x + batch * x_batch + head * x_head + channels * x_channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_batch + group * B_group + states * B_state, mask=known, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + group * C_group + states * C_state, mask=known, other=0.0).to(tl.float32)

    state = h + batch * h_batch + head * h_head + (channels[:, None] * h_channel + states[None, :] * h_state)
    now = decay * tl.load(state, mask=mask, other=0.0) + (delta * u)[:, None] * b[None, :]
    tl.store(state, now, mask=mask)
    # A state that does not exist is NaN where the input is infinite.
    out = tl.sum(tl.where(mask, c[None, :] * now, 0.0), 1)
    if D is not None:
        out += tl.load(D + head * D_head + channels * D_channel, mask=inside, other=0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + batch * z_batch + head * z_head + channels * z_channel, mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + (batch * heads + head) * p + channels, out.to(y.dtype.element_ty), mask=inside)


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    batch, heads, p = x.shape
    groups, n = B.shape[1:]
    y = x.new_empty(batch, heads, p)
    if y.numel() > 0:
        # A D of each head is the same for its channels.
        D_strides = (0, 0) if D is None else (*D.stride(), 0)[:2]
        N = padded(n)
        BP = max(min(STATES // N, padded(p)), 1)
        ssd_token.launch(
            (batch * heads * -(-p // BP), 1, 1),
            (x, dt, A.contiguous(), B, C, D, z, None if dt_bias is None else dt_bias.contiguous(), h, y),
            (heads, p, n, heads // groups, *x.stride(), *dt.stride(), *B.stride(), *C.stride(), *D_strides)
            + (*((0, 0, 0) if z is None else z.stride()), *h.stride()),
            (softplus, low, high, N, BP),
            WARPS,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
