"""The decode step of ssd in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp, sigmoid, softplus
from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel, padded
from ssmscan.ops.ssd.tiles import bounded

# States of a program, over its channels; a thread takes sixteen, four times 16 bytes.
STATES = 2048
WARPS = 4


@kernel(do_not_specialize=["L", "rows"])
def ssd_tokens(
    # read; h is overwritten
    x, dt, A, B, C, D, z, dt_bias, h, state_indices,
    # written
    y,
    # sizes
    L, rows, heads, p, n, per_group,
    # strides
    x_batch, x_time, x_head, x_channel, z_batch, z_time, z_head, z_channel,
    B_batch, B_time, B_group, B_state, C_batch, C_time, C_group, C_state, dt_batch, dt_time, dt_head,
    D_head, D_channel, h_row, h_head, h_channel, h_state,
    # constants
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, A_IS_LOG: tl.constexpr,
    N: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y for L tokens and BP channels of one head of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(p, BP)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    row, taken = pool_row(state_indices, batch, rows)
    group = head // per_group
    channels = (tl.program_id(0) % blocks * BP + tl.arange(0, BP)).to(tl.int64)
    inside = channels < p
    states = tl.arange(0, N).to(tl.int64)
    known = states < n
    mask = inside[:, None] & known[None, :]

    pointers = h + row * h_row + head * h_head + (channels[:, None] * h_channel + states[None, :] * h_state)
    state = tl.load(pointers, mask=mask & taken, other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    if A_IS_LOG:
        rate = -exp(rate)
    if dt_bias is not None:
        bias = tl.load(dt_bias + head).to(tl.float32)
    if D is not None:
        skip = tl.load(D + head * D_head + channels * D_channel, mask=inside, other=0.0).to(tl.float32)
    x += batch * x_batch + head * x_head + channels * x_channel
    if z is not None:
        z += batch * z_batch + head * z_head + channels * z_channel
    B += batch * B_batch + group * B_group + states * B_state
    C += batch * C_batch + group * C_group + states * C_state
    for t in range(L):
        time = tl.cast(t, tl.int64)
        delta = tl.load(dt + batch * dt_batch + time * dt_time + head * dt_head).to(tl.float32)
        u = tl.load(x + time * x_time, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + time * B_time, mask=known, other=0.0).to(tl.float32)
        c = tl.load(C + time * C_time, mask=known, other=0.0).to(tl.float32)
        if dt_bias is not None:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = bounded(delta, LOW, HIGH)
        # Spelled out, to round the same for every token.
        now = tl.fma(exp(delta * rate), state.to(tl.float32), (delta * u)[:, None] * b[None, :])
        # A state that does not exist is NaN where the input is infinite.
        out = tl.sum(tl.where(mask, c[None, :] * now, 0.0), 1)
        if D is not None:
            out += skip * u
        if z is not None:
            gate = tl.load(z + time * z_time, mask=inside, other=0.0).to(tl.float32)
            out *= gate * sigmoid(gate)
        out = tl.where(taken, out, 0.0)
        tl.store(y + ((batch * L + t) * heads + head) * p + channels, out.to(y.dtype.element_ty), mask=inside)
        state = now.to(h.dtype.element_ty)
    tl.store(pointers, state, mask=mask & taken)


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
    state_indices: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    A_is_log: bool,
) -> Tensor:
    batch, *_, heads, p = x.shape
    groups, n = B.shape[-2:]
    # A D of each head is the same for its channels.
    D_strides = (0, 0) if D is None else (*D.stride(), 0)[:2]
    N = padded(n)
    BP = max(min(STATES // N, padded(p)), 1)
    return launch(
        ssd_tokens,
        batch * heads * -(-p // BP),
        x.shape[1] if x.dim() == 4 else 1,
        (x, dt, A.contiguous(), B, C, D, z, None if dt_bias is None else dt_bias.contiguous()),
        h,
        state_indices,
        (heads, p, n, heads // groups, *token_strides(4, x, z, B, C), *token_strides(3, dt), *D_strides) + h.stride(),
        (softplus, low, high, A_is_log, N, BP),
        WARPS,
    )
