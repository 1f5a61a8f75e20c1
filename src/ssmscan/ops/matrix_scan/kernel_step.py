"""The decode step of matrix_scan in one launch."""

import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ssmscan.ops._triton.activation import exp
from ssmscan.ops._triton.launch import kernel, padded

# Elements of a program, over its rows; a thread takes four, 16 bytes of the state.
ELEMENTS = 512
WARPS = 4


@kernel(do_not_specialize=[])
def matrix_scan_token(
    x, log_a, h, y,
    R, C, x_batch, x_row, x_column, a_batch, a_row, h_batch, h_row, h_column, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y for one token, BR rows and BC columns of one batch row; the state is advanced in place."""
    across = tl.cdiv(C, BC)
    down = tl.cdiv(R, BR)
    rows = (tl.program_id(0) // across % down * BR + tl.arange(0, BR)).to(tl.int64)
    columns = (tl.program_id(0) % across * BC + tl.arange(0, BC)).to(tl.int64)
    batch = (tl.program_id(0) // (across * down)).to(tl.int64)
    exists = rows < R
    mask = exists[:, None] & (columns < C)[None, :]

    decay = exp(tl.load(log_a + batch * a_batch + rows * a_row, mask=exists, other=0.0).to(tl.float32))
    u = tl.load(x + batch * x_batch + (rows[:, None] * x_row + columns[None, :] * x_column), mask=mask, other=0.0)
    state = h + batch * h_batch + (rows[:, None] * h_row + columns[None, :] * h_column)
    now = decay[:, None] * tl.load(state, mask=mask, other=0.0) + u.to(tl.float32)
    tl.store(state, now, mask=mask)
    tl.store(y + ((batch * R + rows)[:, None] * C + columns[None, :]), now.to(y.dtype.element_ty), mask=mask)


def step(x: Tensor, log_a: Tensor, h: Tensor) -> Tensor:
    batch, r, c = x.shape
    y = x.new_empty(batch, r, c)
    if y.numel() > 0:
        BC = min(ELEMENTS, padded(c))
        BR = min(ELEMENTS // BC, padded(r))
        matrix_scan_token.launch(
            (batch * -(-r // BR) * -(-c // BC), 1, 1),
            (x, log_a, h, y),
            (r, c, *x.stride(), *log_a.stride(), *h.stride()),
            (BR, BC),
            WARPS,
        )
        # A derivative that needs the state as it was is refused, as after PyTorch's own updates in place.
        increment_version(h)
    return y
