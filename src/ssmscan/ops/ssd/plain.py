"""The scan in plain PyTorch, by matrix products within chunks; differentiable any number of times, on any device.

Each chunk of 64 tokens is a product with a triangle of decays, and adds to the state that enters it. The chunks' states
follow the same recurrence, one decay for each chunk and head. Every sum of log-decays starts where its product does, so
none is a difference of long sums, and a decay too large for a number is multiplied in parts, of which none is infinite:
any decay is safe, zero too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.cuts import Cuts, cut
from ssmscan.ops.packing import last_tokens
from ssmscan.ops.recurrence import carry, grown, log_largest, scaled_exp
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.shapes import state_dtype

CHUNK = 64


def ssd(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, h0, sequence = inputs
    softplus, low, high, reverse = options
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
    h = x.new_zeros(batch, heads, p, n, dtype=dtype) if h0 is None else h0.to(dtype)
    if l == 0:
        return x * 1, h * 1
    A = A.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if softplus else delta).clamp(low, high)

    if sequence is None:
        chunks: Cuts | None = None
        index: Tensor | None = None
    else:
        chunks = cut(sequence, h.shape[0], CHUNK, reverse)
        index = _positions(chunks, l)

    def split(v: Tensor) -> Tensor:
        """(b, l, ...) as (b, chunks, CHUNK, ...) in scan order, with zeros where a chunk is not full."""
        v = v.flip(1) if reverse else v
        pad = 1 if index is not None else -l % CHUNK
        v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad))
        return (v if index is None else v[:, index]).unflatten(1, (-1, CHUNK))

    # Heads before tokens, groups of heads apart: (b, c, g, k, q, ...), k the heads of a group.
    X = split(x.to(dtype) * delta[..., None]).movedim(2, 3).unflatten(2, (groups, -1))
    Bs, Cs = (split(v.to(dtype)).movedim(2, 3)[:, :, :, None] for v in (B, C))
    log_a = split(delta * A).movedim(2, 3).unflatten(2, (groups, -1))
    pairs, entered, left = _logarithms(log_a)
    states = (grown(X, left[..., None]).mT @ Bs).flatten(2, 3)
    first, owner = (None, None) if chunks is None else (chunks.first, chunks.sequence)
    entering, after = carry(*scaled_exp(log_a.sum(-1).flatten(2, 3)[..., None, None]), states, h, first, owner)
    y = _weighted(pairs, log_a.detach().clamp(min=0), Cs @ Bs.mT, X)
    y = y + grown(Cs @ entering.unflatten(2, (groups, -1)).mT, entered[..., None])
    y = y.flatten(2, 3).movedim(3, 2).flatten(1, 2)
    if sequence is None or chunks is None or index is None:
        y, final = y[:, :l], after[:, -1]
    else:
        # Where each position of the sequence lies in the chunks.
        y = y[:, torch.zeros(l + 1, dtype=index.dtype, device=x.device).scatter(0, index, _arange(index))[:l]]
        _, empty = last_tokens(sequence, h.shape[0], reverse)
        last = torch.zeros(h.shape[0] + 1, dtype=index.dtype, device=x.device)
        last = last.scatter(0, torch.where(chunks.last, chunks.sequence, h.shape[0]), _arange(chunks.last))
        final = torch.where(empty[:, None, None, None], h, after[0, last[:-1]])
    y = y.flip(1) if reverse else y
    if D is not None:
        y = y + D.to(dtype).view(heads, -1) * x.to(dtype)
    return (y if z is None else y * F.silu(z.to(dtype))).to(x.dtype), final


def _arange(v: Tensor) -> Tensor:
    return torch.arange(v.shape[0], device=v.device)


def _positions(chunks: Cuts, l: int) -> Tensor:
    """The position of each row of each chunk, l where there is none."""
    row = torch.arange(CHUNK, device=chunks.begin.device)
    return torch.where(row < chunks.length[:, None], chunks.begin[:, None] + row, l).flatten()


def _logarithms(log_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the decays among a chunk's q tokens: from j to i (q, q), from the chunk's begin to i, from j to its end."""
    i = torch.arange(CHUNK, device=log_a.device)
    later, upto = i[:, None] > i, i[:, None] >= i
    # Sums over k of log_a_k, j < k <= i.
    terms = torch.where(later, log_a[..., None], 0)
    return terms.cumsum(-2).masked_fill(~upto, -torch.inf), log_a.cumsum(-1), terms.sum(-2)


def _weighted(pairs: Tensor, growth: Tensor, scores: Tensor, X: Tensor) -> Tensor:
    """Σ_j exp(pairs_ij)·scores_ij·X_j; the decays beyond the root of the largest number are multiplied in three parts.

    A part of them goes with the tokens and a part with the outputs, those that may have such decays; ``growth`` is the
    part above zero of each token's log-decay.
    """
    limit = log_largest(X) / 2
    far = pairs > limit
    near = torch.where(far, -torch.inf, pairs).exp()
    beyond = torch.where(far, pairs.clamp(max=3 * limit) - 2 * limit, -torch.inf).exp()
    upto = growth.cumsum(-1)
    before, after = ((v > limit).to(X.dtype) * limit for v in (upto[..., -1:] - upto, upto))
    y = ((beyond * scores) @ (before.exp()[..., None] * X)) * after.exp()[..., None]
    return y + (near * scores) @ X
