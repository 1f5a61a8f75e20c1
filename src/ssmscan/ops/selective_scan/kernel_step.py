"""The decode step of selective_scan in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp, sigmoid, softplus
from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel, padded

# States of a program, over its channels; a thread takes four, 16 bytes.
STATES = 512
WARPS = 4


@kernel(do_not_specialize=["L", "rows"])
def selective_scan_tokens(
    # read; h is overwritten
    x, dt, A, B, C, D, z, dt_bias, h, state_indices,
    # written
    y,
    # sizes
    L, rows, d, n, per_group,
    # strides
    x_batch, x_time, x_channel, dt_batch, dt_time, dt_channel, z_batch, z_time, z_channel,
    B_batch, B_time, B_group, B_state, C_batch, C_time, C_group, C_state, A_channel, A_state, h_row, h_channel, h_state,
    # constants
    SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for L tokens and BD channels of one group of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(per_group, BD)
    groups = d // per_group
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    row, taken = pool_row(state_indices, batch, rows)
    within = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = within < per_group
    channels = group * per_group + within
    states = tl.arange(0, N).to(tl.int64)
    known = states < n
    mask = inside[:, None] & known[None, :]

    pointers = h + row * h_row + (channels[:, None] * h_channel + states[None, :] * h_state)
    state = tl.load(pointers, mask=mask & taken, other=0.0)
    weights = A + (channels[:, None] * A_channel + states[None, :] * A_state)
    a = tl.load(weights, mask=mask, other=0.0).to(tl.float32)
    if A_IS_LOG:
        a = -exp(a)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    for t in range(L):
        time = tl.cast(t, tl.int64)
        u = tl.load(x + batch * x_batch + time * x_time + channels * x_channel, mask=inside, other=0.0).to(tl.float32)
        delta = tl.load(dt + batch * dt_batch + time * dt_time + channels * dt_channel, mask=inside, other=0.0)
        b = tl.load(B + batch * B_batch + time * B_time + group * B_group + states * B_state, mask=known, other=0.0)
        c = tl.load(C + batch * C_batch + time * C_time + group * C_group + states * C_state, mask=known, other=0.0)
        delta = delta.to(tl.float32)
        if dt_bias is not None:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        added = (delta * u)[:, None] * b.to(tl.float32)[None, :]
        # Spelled out, to round the same for every token.
        now = tl.fma(exp(delta[:, None] * a), state.to(tl.float32), added)
        # A state that does not exist is NaN where the input is infinite.
        out = tl.sum(tl.where(mask, c.to(tl.float32)[None, :] * now, 0.0), 1)
        if D is not None:
            out += skip * u
        if z is not None:
            gate = tl.load(z + batch * z_batch + time * z_time + channels * z_channel, mask=inside, other=0.0)
            gate = gate.to(tl.float32)
            out *= gate * sigmoid(gate)
        out = tl.where(taken, out, 0.0)
        tl.store(y + (batch * L + t) * d + channels, out.to(y.dtype.element_ty), mask=inside)
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
    A_is_log: bool,
) -> Tensor:
    batch, d = x.shape[0], x.shape[-1]
    groups, n = B.shape[-2:]
    D, dt_bias = (t if t is None else t.contiguous() for t in (D, dt_bias))
    N = padded(n)
    BD = max(STATES // N, 1)
    return launch(
        selective_scan_tokens,
        batch * groups * -(-d // groups // BD),
        x.shape[1] if x.dim() == 3 else 1,
        (x, dt, A, B, C, D, z, dt_bias),
        h,
        state_indices,
        (d, n, d // groups, *token_strides(3, x, dt, z), *token_strides(4, B, C), *A.stride(), *h.stride()),
        (softplus, A_is_log, N, BD),
        WARPS,
    )
