"""The loss of a language model whose head scores a part of the tokens on each rank."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ssmscan.distributed.handover import exchange
from ssmscan.models.loss import IGNORE, Vocabulary, loss_kernels


class SplitVocabulary(Vocabulary):
    """What a model's :class:`Vocabulary` is where each rank of ``mesh`` scores so many tokens, in their order.

    The ranks tell each other two numbers for each row, and never its scores: log Σⱼ exp(sⱼ) over their own tokens, of
    which the whole is made again, and the target's score.

    Shoeybi et al., "Megatron-LM" (2019), section 3, has the loss of such a head.
    """

    def __init__(self, mesh: DeviceMesh, own: int) -> None:
        self.mesh, self.own = mesh, own
        self.ranks, self.first = mesh.size(), mesh.get_local_rank() * own

    def scores(self, head: nn.Module, x: Tensor) -> Tensor:
        # Without the hook that puts the ranks' scores together.
        return head.forward(x)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kernels = loss_kernels(logits)
        if kernels is None:
            own = self._levels(logits, targets)
        else:
            own = kernels.levels(logits, targets, self.first)
        found = exchange(own.flatten(), self.mesh.get_group())().unflatten(1, own.shape)
        level, score = found[:, 0].logsumexp(0), found[:, 1].sum(0)
        asked = targets != IGNORE
        known = (targets >= 0) & (targets < self.own * self.ranks)
        losses = (level - score).where(asked, 0).where(known | ~asked, torch.nan)
        if kernels is None:
            return losses, self._gradient(logits, targets, level)
        return losses, kernels.gradient(logits, targets, level, self.first, IGNORE)

    def _levels(self, logits: Tensor, targets: Tensor) -> Tensor:
        place, here = self._place(targets)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.gather(1, place.unsqueeze(1)).squeeze(1).where(here, 0)
        return torch.stack([wide.logsumexp(1), scores])

    def _gradient(self, logits: Tensor, targets: Tensor, level: Tensor) -> Tensor:
        place, here = self._place(targets)
        gradient = (logits - level.unsqueeze(1)).exp_()
        gradient.scatter_add_(1, place.unsqueeze(1), -here.unsqueeze(1).to(gradient.dtype))
        return gradient.where((targets != IGNORE).unsqueeze(1), 0).to(logits.dtype)

    def _place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each target the place among the tokens here, and whether it is one of them."""
        place = targets - self.first
        here = (place >= 0) & (place < self.own)
        return place.where(here, 0), here
