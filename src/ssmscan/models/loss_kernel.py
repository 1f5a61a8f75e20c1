"""The cross entropy of rows of logits and its gradient, in one pass over them and another through the cache.

Where a row's logits are shared out, the two passes are two calls: what this part of a row knows, and its gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.launch import kernel

BLOCK = 4096
WARPS = 8


@triton.jit
def level_of(logits, v, BLOCK: tl.constexpr):
    """log Σⱼ exp(sⱼ) of a row of v logits."""
    lane = tl.arange(0, BLOCK)
    # Of each lane its own maximum and sum: what is below every float counts for nothing.
    peak = tl.full((BLOCK,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, v, BLOCK):
        s = tl.load(logits + first + lane, mask=first + lane < v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, s)
        total = total * tl.exp(peak - higher) + tl.exp(s - higher)
        peak = higher
    highest = tl.max(peak, 0)
    return highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))


@triton.jit
def store_gradient(logits, dlogits, level, target, asked, v, BLOCK: tl.constexpr):
    """softmax(s) − 1ₜ of a row of v logits, part of one that has the ``level``; zeros where nothing is ``asked``."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, v, BLOCK):
        inside = first + lane < v
        s = tl.load(logits + first + lane, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(s - level) - tl.where(first + lane == target, 1.0, 0.0)
        gradient = tl.where(asked, gradient, 0.0).to(dlogits.dtype.element_ty)
        tl.store(dlogits + first + lane, gradient, mask=inside)


@kernel(do_not_specialize=["v"])
def cross_entropy_rows(logits, targets, losses, dlogits, v, ignore, BLOCK: tl.constexpr):
    """A row of v logits: log Σⱼ exp(sⱼ) − sₜ and softmax(s) − 1ₜ; zeros without a target, NaN for one that is none."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    level = level_of(logits + row * v, v, BLOCK)
    known = (target >= 0) & (target < v)
    at_target = tl.load(logits + row * v + target, mask=known, other=float("nan")).to(tl.float32)
    asked = target != ignore
    tl.store(losses + row, tl.where(asked, level - at_target, 0.0))
    store_gradient(logits + row * v, dlogits + row * v, level, target, asked, v, BLOCK)


@kernel(do_not_specialize=["v"])
def level_rows(logits, targets, levels, scores, v, first, BLOCK: tl.constexpr):
    """A row of v logits, that of token ``first`` the first: log Σⱼ exp(sⱼ), and sₜ, which is 0 for other tokens."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row) - first
    tl.store(levels + row, level_of(logits + row * v, v, BLOCK))
    here = (target >= 0) & (target < v)
    tl.store(scores + row, tl.load(logits + row * v + target, mask=here, other=0.0).to(tl.float32))


@kernel(do_not_specialize=["v"])
def gradient_rows(logits, targets, levels, dlogits, v, first, ignore, BLOCK: tl.constexpr):
    """The gradient of the loss of a whole row by the v logits of :func:`level_rows`, from the level of that."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    level = tl.load(levels + row)
    store_gradient(logits + row * v, dlogits + row * v, level, target - first, target != ignore, v, BLOCK)


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The loss (n,) of each row of logits (n, v), in float32, and its gradient by them."""
    logits, targets = logits.contiguous(), targets.contiguous()
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    dlogits = torch.empty_like(logits)
    n, v = logits.shape
    if logits.numel() > 0:
        cross_entropy_rows.launch((n, 1, 1), (logits, targets, losses, dlogits), (v, ignore), (BLOCK,), WARPS)
    return losses, dlogits


def levels(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """log Σ exp of each row of logits (n, v), those of the tokens from ``first`` on, and the target's or 0: (2, n)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    n, v = logits.shape
    found = logits.new_empty(2, n, dtype=torch.float32)
    if logits.numel() > 0:
        level_rows.launch((n, 1, 1), (logits, targets, found[0], found[1]), (v, first), (BLOCK,), WARPS)
    return found


def gradient(logits: Tensor, targets: Tensor, level: Tensor, first: int, ignore: int) -> Tensor:
    """That of the losses by the logits (n, v) of the tokens from ``first`` on, where whole rows have the ``level``."""
    logits, targets, level = logits.contiguous(), targets.contiguous(), level.contiguous()
    dlogits = torch.empty_like(logits)
    n, v = logits.shape
    if logits.numel() > 0:
        gradient_rows.launch((n, 1, 1), (logits, targets, level, dlogits), (v, first, ignore), (BLOCK,), WARPS)
    return dlogits
