"""The arguments that the scan from the right may share with the one from the left."""

from collections.abc import Iterable

from torch import Tensor


def given(own: Iterable[Tensor | None], others: Iterable[Tensor]) -> list[Tensor]:
    """Of the arguments of the scan from the right its ``own`` ones, or those of the scan from the left."""
    return [other if tensor is None else tensor for tensor, other in zip(own, others, strict=True)]


def shared(gradient: Tensor, back: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of an argument of the scan from the left and of the other one's ``own``, empty if it has none."""
    return (gradient + back, back.new_empty(0)) if own is None else (gradient, back)
