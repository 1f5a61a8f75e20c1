"""The cross entropy of rows of logits and its gradient, in one pass over them and another through the cache."""

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel

BLOCK = 4096
WARPS = 8


@kernel(do_not_specialize=["v"])
def cross_entropy_rows(logits, targets, losses, dlogits, v, ignore, BLOCK: tl.constexpr):
    """A row of v logits: log Σⱼ exp(sⱼ) − sₜ and softmax(s) − 1ₜ; zeros without a target, NaN for one that is none."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # Of each lane its own maximum and sum: what is below every float counts for nothing.
    peak = tl.full((BLOCK,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, v, BLOCK):
        s = tl.load(logits + row * v + first + lane, mask=first + lane < v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, s)
        total = total * tl.exp(peak - higher) + tl.exp(s - higher)
        peak = higher
    highest = tl.max(peak, 0)
    level = highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))
    known = (target >= 0) & (target < v)
    at_target = tl.load(logits + row * v + target, mask=known, other=float("nan")).to(tl.float32)
    asked = target != ignore
    tl.store(losses + row, tl.where(asked, level - at_target, 0.0))
    for first in range(0, v, BLOCK):
        inside = first + lane < v
        s = tl.load(logits + row * v + first + lane, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(s - level) - tl.where(first + lane == target, 1.0, 0.0)
        gradient = tl.where(asked, gradient, 0.0).to(dlogits.dtype.element_ty)
        tl.store(dlogits + row * v + first + lane, gradient, mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The loss (n,) of each row of logits (n, v), in float32, and its gradient by them."""
    logits, targets = logits.contiguous(), targets.contiguous()
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    dlogits = torch.empty_like(logits)
    n, v = logits.shape
    if logits.numel() > 0:
        cross_entropy_rows.launch((n, 1, 1), (logits, targets, losses, dlogits), (v, ignore), (BLOCK,), WARPS)
    return losses, dlogits
