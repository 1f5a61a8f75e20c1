"""The loss of a language model without the logits of all its tokens at once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ssmscan.backend import why_not
from ssmscan.shapes import product_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORE = -100

# Logits of one chunk: a quarter of a gigabyte in bfloat16.
_CHUNK = 2**27
# Rows of one chunk in float16, whose products sum so many gradients, not divided by their number, and end at 65504.
_HALF_ROWS = 2**12


class Holders:
    """The processes that hold tokens of a batch: this one alone. :mod:`ssmscan.distributed` has one of several."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all holders give, the same for each; its gradient is that of the holder's own share."""
        return x


class Vocabulary:
    """The tokens whose scores this process makes: all. :mod:`ssmscan.distributed` has one of several processes."""

    ranks = 1

    def scores(self, head: nn.Module, x: Tensor) -> Tensor:
        """Of x, (n, m), the logits (n, v / ranks) that are made here."""
        return head(x)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (n,) of each row, and its gradient by the logits that are made here."""
        return cross_entropy(logits, targets)


@torch.compiler.disable
def linear_cross_entropy(
    head: nn.Module,
    x: Float[Tensor, "n m"],
    targets: Int[Tensor, " n"],
    v: int,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008
) -> Tensor:
    """Sum of the cross entropies of ``head(x)`` against ``targets``, in nats, chunk by chunk.

        Σᵢ log Σⱼ exp(sᵢⱼ) − sᵢₜ,   s = head(x), t = targetsᵢ

    The gradient is computed along with the loss and kept, which is that of x and of the head's parameters. So one
    chunk's logits and their gradient exist at a time, and no product is computed twice.

    Args:
        head: from the stream to the logits; any module, an adapter's for example.
        x: the stream after the last norm.
        targets: tokens in 0 … v-1; -100 asks for nothing.
        v: number of tokens.
        vocabulary: which of them the head scores in this process. Default: all.

    Returns:
        the sum, a scalar in float32 (float64 for float64 inputs).

    ``torch.nn.functional.linear_cross_entropy`` does it too, from PyTorch 2.13 on, for a plain weight.

    Example:
        >>> import torch
        >>> from ssmscan.models.loss import linear_cross_entropy
        >>> head, x = torch.nn.Linear(4, 7), torch.randn(5, 4)
        >>> loss = linear_cross_entropy(head, x, torch.tensor([0, 3, -100, 6, 1]), v=7)
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([7, 4])
    """
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    learns = torch.is_grad_enabled() and (x.requires_grad or len(weights) > 0)
    rows = max(_CHUNK * vocabulary.ranks // v, 1)
    if torch.float16 in (x.dtype, product_dtype(x)):
        rows = min(rows, _HALF_ROWS)
    return _Loss.apply(head, vocabulary, rows, learns, targets, x, *weights)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        vocabulary: Vocabulary,
        rows: int,
        learns: bool,
        targets: Tensor,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if learns else None
        # Parameters in a narrow dtype are summed in a wide one.
        sums = [torch.zeros_like(weight, dtype=wide) for weight in weights] if learns else []
        for first in range(0, x.shape[0], rows):
            chunk = slice(first, first + rows)
            part = x[chunk].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = vocabulary.scores(head, part)
            losses, dlogits = vocabulary.cross_entropy(logits.detach(), targets[chunk])
            loss += losses.sum()
            if learns:
                # In this thread, for a forward has nothing to overlap with.
                with torch.autograd.set_multithreading_enabled(False):
                    dpart, *dweights = torch.autograd.grad(
                        logits, [part, *weights], dlogits, allow_unused=True, materialize_grads=True
                    )
                cast(Tensor, dx)[chunk] = dpart
                for total, gradient in zip(sums, dweights, strict=True):
                    total += gradient
        if learns:
            ctx.save_for_backward(dx, *sums)
        ctx.dtypes = [weight.dtype for weight in weights]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, *sums = ctx.saved_tensors
        # Narrow only when divided by the number of tokens, before which a sum may be beyond float16.
        dweights = ((total * dloss).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        return *(None,) * 5, dx * dloss, *dweights


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (n,) of each row of logits (n, v), in float32 or wider, and its gradient by them, in their dtype."""
    kernels = loss_kernels(logits)
    if kernels is not None:
        return kernels.cross_entropy(logits, targets, IGNORE)
    asked = targets != IGNORE
    # A target that is no token is refused by gather.
    index = targets.where(asked, 0).unsqueeze(1)
    scores = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -scores.gather(1, index).squeeze(1).where(asked, 0)
    # exp(s) - 1 at the target, 0 in rows that are not asked for.
    scores.exp_().scatter_add_(1, index, scores.new_full(index.shape, -1))
    return losses, torch.mul(scores, asked.unsqueeze(1), out=torch.empty_like(logits))


def loss_kernels(logits: Tensor) -> ModuleType | None:
    """The kernels for such logits, where there are any."""
    if not logits.is_cuda or why_not("triton", "cuda", logits.dtype) is not None:
        return None
    from ssmscan.models import loss_kernel

    return loss_kernel
