"""The decode step of matrix_scan in one launch."""

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import exp
from ssmscan.ops._triton.decode import launch, pool_row, token_strides
from ssmscan.ops._triton.launch import kernel, padded

# Elements of a program, over its rows; a thread takes four, 16 bytes of the state.
ELEMENTS = 512
WARPS = 4


@kernel(do_not_specialize=["L", "states"])
def matrix_scan_tokens(
    x, log_a, h, state_indices, y,
    L, states, R, C, x_batch, x_time, x_row, x_column, a_batch, a_time, a_row, h_state, h_row, h_column,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y for L tokens, BR rows and BC columns of one batch row; the state is advanced in place."""
    across = tl.cdiv(C, BC)
    down = tl.cdiv(R, BR)
    rows = (tl.program_id(0) // across % down * BR + tl.arange(0, BR)).to(tl.int64)
    columns = (tl.program_id(0) % across * BC + tl.arange(0, BC)).to(tl.int64)
    batch = (tl.program_id(0) // (across * down)).to(tl.int64)
    number, taken = pool_row(state_indices, batch, states)
    exists = rows < R
    mask = exists[:, None] & (columns < C)[None, :]
    element = rows[:, None] * x_row + columns[None, :] * x_column

    pointers = h + number * h_state + (rows[:, None] * h_row + columns[None, :] * h_column)
    state = tl.load(pointers, mask=mask & taken, other=0.0)
    for t in range(L):
        time = tl.cast(t, tl.int64)
        log_decay = tl.load(log_a + batch * a_batch + time * a_time + rows * a_row, mask=exists, other=0.0)
        u = tl.load(x + batch * x_batch + time * x_time + element, mask=mask, other=0.0)
        now = exp(log_decay.to(tl.float32))[:, None] * state.to(tl.float32) + u.to(tl.float32)
        out = tl.where(taken, now, 0.0).to(y.dtype.element_ty)
        tl.store(y + (((batch * L + t) * R + rows)[:, None] * C + columns[None, :]), out, mask=mask)
        state = now.to(h.dtype.element_ty)
    tl.store(pointers, state, mask=mask & taken)


def step(x: Tensor, log_a: Tensor, h: Tensor, state_indices: Tensor | None) -> Tensor:
    batch, *_, r, c = x.shape
    BC = min(ELEMENTS, padded(c))
    BR = min(ELEMENTS // BC, padded(r))
    return launch(
        matrix_scan_tokens,
        batch * -(-r // BR) * -(-c // BC),
        x.shape[1] if x.dim() == 4 else 1,
        (x, log_a),
        h,
        state_indices,
        (r, c, *token_strides(4, x), *token_strides(3, log_a), *h.stride()),
        (BR, BC),
        WARPS,
    )
