"""Sequences and models split over processes, on torch.distributed."""

from ssmscan.distributed.context import context_parallel
from ssmscan.distributed.gathering import full_state_dict
from ssmscan.distributed.parallelize import parallelize
from ssmscan.distributed.sharding import sum_gradients

__all__ = ["context_parallel", "full_state_dict", "parallelize", "sum_gradients"]
