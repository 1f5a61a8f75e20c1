"""Times of steps that take from microseconds to seconds, and the memory that they need."""

import statistics
import time
from collections.abc import Callable

import torch

from ssmscan.bench import measure

# As many calls as a CUDA graph needs before it is replayed, and one more.
WARM_UP = 6
# Seconds of calls behind one number, and the most and fewest measurements that it is the median of.
BUDGET = 2.0
REPEATS = (2, 7)
# Calls between two synchronisations: the host may be ahead.
TOGETHER = 3
# Seconds above which a call is timed by the host's clock: the launch no longer counts.
LONG = 0.02


def settle(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], object], device: str, calls: int = 1) -> float:
    """The time of one of several calls in a row."""
    settle(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    settle(device)
    return (time.perf_counter() - start) / calls


def step_ms(step: Callable[[], object], device: str) -> float:
    """The time of a step of a model, host and device together, after a warm-up."""
    for _ in range(WARM_UP):
        once = seconds(step, device)
    fewest, most = REPEATS
    repeats = min(max(fewest, round(BUDGET / (TOGETHER * once))), most)
    return 1e3 * statistics.median(seconds(step, device, TOGETHER) for _ in range(repeats))


def host_ms(step: Callable[[], object], device: str, repeats: int = 15) -> float:
    """The time in which the host launches a step, whose work fits into the device's queue, after a warm-up."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(repeats):
        settle(device)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def call_ms(call: Callable[[], object], device: str) -> float:
    """The time of a call of an operation: the device's where it is short, whatever the host takes."""
    # The first compiles and the second is written down.
    once = min(seconds(call, device) for _ in range(3))
    if once < LONG:
        return measure.time_calls(lambda _: call(), 1, device).median_ms
    return 1e3 * statistics.median([once, *(seconds(call, device) for _ in range(2))])


def forget_peak(device: str) -> None:
    """Begin to look for the peak of the device's memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """The most memory that was held at a time since then; None on a CPU."""
    return measure.rounded(torch.cuda.max_memory_allocated() / 2**30) if device == "cuda" else None
