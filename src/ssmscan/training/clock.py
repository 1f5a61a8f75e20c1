"""How long a run takes, how many tokens it reads in a second, and what of the device's peak that is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ssmscan.layers import Attention
from ssmscan.models import SSMForCausalLM
from ssmscan.training.config import TrainConfig

# Dense products of bfloat16 and float16 (FLOP/s), from the vendor's data sheets, by a part of the device's name.
PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


class Clock:
    """The seconds of a run, those before it was continued included, and its throughput while it trains.

    Args:
        config: what says when a checkpoint is due.
        flops: operations for a token, :func:`flops_per_token` of the model as one process has it.
        device: of this process.
        seconds: of the run so far.
        processes: how many share the work, each with such a device.
    """

    def __init__(
        self, config: TrainConfig, flops: float, device: torch.device, seconds: float, processes: int = 1
    ) -> None:
        self.device, self.flops = device, flops
        self.minutes = config.save_minutes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak * processes for part, peak in PEAK.items() if part in name), None)
        self.began = time.perf_counter() - seconds
        self.saved()
        self._restart()

    def _restart(self) -> None:
        self.tokens, self.idle, self.since = 0, 0.0, time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def saved(self) -> None:
        """A checkpoint was written."""
        self._last_save = time.perf_counter()

    def save_is_due(self) -> bool:
        """Whether save_minutes have gone by without a checkpoint."""
        return self.minutes is not None and time.perf_counter() - self._last_save >= 60 * self.minutes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not of training: throughput leaves it out."""
        started = time.perf_counter()
        yield
        self.idle += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """The run's seconds, and since the last reading tokens_per_second; on CUDA the peak of allocated memory
        (peak_gib), and where the device's peak is known what part of it the model's products took (mfu)."""
        read = {"tokens_per_second": self.tokens / (time.perf_counter() - self.since - self.idle)}
        if self.peak is not None:
            read["mfu"] = read["tokens_per_second"] * self.flops / self.peak
        if self.device.type == "cuda":
            read["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._restart()
        return {**read, "seconds": self.seconds()}


def flops_per_token(model: SSMForCausalLM, length: int) -> float:
    """Operations of a forward and backward for one token, in products of matrices: 6 for each of their entries.

    Attention adds those of its scores and values at half of ``length``, which the mean token sees. Scans are not
    counted, as is the custom; nor is what gradient checkpointing does twice.
    """
    entries = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    seen = sum(
        module.num_heads * module.head_dim * min(length / 2, module.window or length)
        for module in model.modules()
        if isinstance(module, Attention)
    )
    return 6.0 * entries + 12.0 * seen
