"""The decode step of selective_scan in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.activation import exp, sigmoid, softplus
from ssmscan.ops._triton.launch import kernel, padded

# States of a program, over its channels; a thread takes four, 16 bytes.
STATES = 512
WARPS = 4


@kernel(do_not_specialize=[])
def selective_scan_token(
    x, dt, A, B, C, D, z, dt_bias, h, y,
    d, n, per_group, x_batch, x_channel, dt_batch, dt_channel, A_channel, A_state, B_batch, B_group, B_state,
    C_batch, C_group, C_state, z_batch, z_channel, h_batch, h_channel, h_state,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y for one token and BD channels of one group of one batch row; the state is advanced in place."""
    blocks = tl.cdiv(per_group, BD)
    groups = d // per_group
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    within = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = within < per_group
    channels = group * per_group + within
    states = tl.arange(0, N).to(tl.int64)
    known = states < n
    mask = inside[:, None] & known[None, :]

    u = tl.load(x + batch * x_batch + channels * x_channel, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(dt + batch * dt_batch + channels * dt_channel, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    pointers = A + (channels[:, None] * A_channel + states[None, :] * A_state)
    a = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_batch + group * B_group + states * B_state, mask=known, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + group * C_group + states * C_state, mask=known, other=0.0).to(tl.float32)

    state = h + batch * h_batch + (channels[:, None] * h_channel + states[None, :] * h_state)
    now = exp(delta[:, None] * a) * tl.load(state, mask=mask, other=0.0) + (delta * u)[:, None] * b[None, :]
    tl.store(state, now, mask=mask)
    # A state that does not exist is NaN where the input is infinite.
    out = tl.sum(tl.where(mask, c[None, :] * now, 0.0), 1)
    if D is not None:
        out += tl.load(D + channels, mask=inside, other=0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + batch * z_batch + channels * z_channel, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * d + channels, out.to(y.dtype.element_ty), mask=inside)


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
) -> Tensor:
    batch, d = x.shape
    groups, n = B.shape[1:]
    y = x.new_empty(batch, d)
    if y.numel() > 0:
        D, dt_bias = (t if t is None else t.contiguous() for t in (D, dt_bias))
        N = padded(n)
        BD = max(STATES // N, 1)
        selective_scan_token.launch(
            (batch * groups * -(-d // groups // BD), 1, 1),
            (x, dt, A, B, C, D, z, dt_bias, h, y),
            (d, n, d // groups, *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride())
            + (*((0, 0) if z is None else z.stride()), *h.stride()),
            (softplus, N, BD),
            WARPS,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
