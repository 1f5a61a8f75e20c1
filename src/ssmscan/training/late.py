"""What the device computes ahead of the host: batches before they are needed, numbers after they were."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ssmscan.tasks import Batch
from ssmscan.training.config import TrainConfig

# Steps that may be queued on a CUDA device before the host waits for the oldest.
_AHEAD = 2


def batches(config: TrainConfig, step: int) -> Iterator[Batch]:
    """The batches of ``config`` from ``step`` on, each made while the one before is trained on."""
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(config.task.batch, config.batch_size, config.seed, step, "train")
        for index in range(step + 1, config.steps + 1):
            batch = following.result()
            if index < config.steps:
                following = maker.submit(config.task.batch, config.batch_size, config.seed, index, "train")
            yield batch


class Late:
    """Numbers of the steps, read once the device has them.

    The host so stays a step or two ahead of the device, and no more.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, numbers: Tensor) -> None:
        """Ask for the ``numbers`` of ``step``."""
        event = None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((step, numbers, event))

    def take(self, everything: bool = False) -> Iterator[tuple[int, list[float]]]:
        """The steps whose numbers are there, oldest first, and their numbers; waits where ``everything`` is wanted."""
        while self._queue:
            step, numbers, event = self._queue[0]
            if event is not None and not event.query():
                if not everything and len(self._queue) <= _AHEAD:
                    return
                event.synchronize()
            self._queue.popleft()
            yield step, numbers.tolist()
