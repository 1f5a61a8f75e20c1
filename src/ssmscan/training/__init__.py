"""Training: a run's configuration, and the loop that carries it out."""

from ssmscan.training.config import ModelConfig, OptimConfig, TrainConfig
from ssmscan.training.errors import RunError, Terminated, UsageError
from ssmscan.training.loop import Metrics, train

__all__ = ["Metrics", "ModelConfig", "OptimConfig", "RunError", "Terminated", "TrainConfig", "UsageError", "train"]
