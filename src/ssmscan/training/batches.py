"""Batches, each made before it is needed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ssmscan.tasks import Batch
from ssmscan.training.config import TrainConfig


def batches(config: TrainConfig, step: int) -> Iterator[Batch]:
    """The batches of ``config`` from ``step`` on, each made while the one before is trained on."""
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(config.task.batch, config.batch_size, config.seed, step, "train")
        for index in range(step + 1, config.steps + 1):
            batch = following.result()
            if index < config.steps:
                following = maker.submit(config.task.batch, config.batch_size, config.seed, index, "train")
            yield batch
