"""Sequences split over processes, on torch.distributed."""

from ssmscan.distributed.context import context_parallel

__all__ = ["context_parallel"]
