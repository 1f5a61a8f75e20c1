"""Training: a run's configuration, and the loop that carries it out."""

from ssmscan.training.chunks import chunked_backward
from ssmscan.training.config import MeshConfig, ModelConfig, OptimConfig, TrainConfig
from ssmscan.training.errors import RunError, Terminated, UsageError
from ssmscan.training.loop import Metrics, train

__all__ = [
    "MeshConfig",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "RunError",
    "Terminated",
    "TrainConfig",
    "UsageError",
    "chunked_backward",
    "train",
]
