"""Time, memory and the machine's copy limit.

Device work is timed by device events, over rotating inputs that together exceed the L2 cache; work on the CPU by the
host's clock. A timed function takes the number of the input set that it is to run on.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# Seconds of calls behind one number, after the warm-up.
BUDGET = 0.3
REPEATS = {"cuda": (20, 2000), "cpu": (5, 200)}
# Seconds of warm-up. A virtual machine is given its memory at first touch, over many calls.
WARM_UP = {"cuda": 0.0, "cpu": 2.0}
# Calls that are queued at a time; a device's queue holds about 1000 launches.
QUEUED = 32
# Cycles of a device in a second, at least as many as it has.
CLOCK = 2e9
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


class Timing(NamedTuple):
    median_ms: float
    p20_ms: float
    p80_ms: float


def time_calls(function: Callable[[int], object], sets: int, device: str) -> Timing:
    """The time of one call of ``function``, which rotates through ``sets`` sets of inputs."""
    record = _device_times if device == "cuda" else _host_times
    # The warm-up, which also says how many calls fit the budget.
    end = time.perf_counter() + WARM_UP[device]
    once = min(record(function, sets, max(sets, 2)))
    while time.perf_counter() < end:
        once = min(once, *record(function, sets, max(sets, 2)))
    fewest, most = REPEATS[device]
    times = record(function, sets, min(max(fewest, round(1e3 * BUDGET / once)), most))
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80)


def time_graph(function: Callable[[int], object], sets: int) -> Timing:
    """The time of one call within the replay of a CUDA graph that holds one call on each set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            function(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All outputs are kept until the capture ends, so that they rotate as the inputs do.
        outputs = [function(i) for i in range(sets)]
    del outputs
    return Timing(*(ms / sets for ms in time_calls(lambda _: graph.replay(), 1, "cuda")))


def _device_times(function: Callable[[int], object], sets: int, repeats: int) -> list[float]:
    for i in range(3):
        function(i % sets)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(3):
        function(i % sets)
    queueing = (time.perf_counter() - start) / 3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for i in range(repeats):
        if i % QUEUED == 0:
            # The device waits while the host queues calls: what the host takes for them is not their time.
            torch.cuda._sleep(round(1.5 * QUEUED * queueing * CLOCK))
        events[2 * i].record()
        function(i % sets)
        events[2 * i + 1].record()
    torch.cuda.synchronize()
    return [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(repeats)]


def _host_times(function: Callable[[int], object], sets: int, repeats: int) -> list[float]:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        function(i % sets)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def input_sets(nbytes: int, device: str) -> int:
    """How many sets of inputs of ``nbytes`` each exceed three times the L2 cache: at least 2, if memory allows it."""
    if device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties().L2_cache_size
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(max(2, 3 * cache // max(nbytes, 1) + 1), free // 4 // max(nbytes, 1), 64))


def rounded(value: float) -> float:
    """Four digits, however small it is: more than a measurement is good for."""
    return float(f"{value:.4g}")


def peak_mib(function: Callable[[int], object], device: str) -> float | None:
    """Peak device memory of one call, over what was held before it, in MiB."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gbps(device: str) -> float:
    """The copy limit: bytes read and written per nanosecond by a large copy within the device's memory."""
    # Ones: untouched zeros may all lie in one page of memory.
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_calls(lambda _: target.copy_(source), 1, device).median_ms / 1e6


def host_us(function: Callable[[], object], calls: int = 200) -> float:
    """Host time of one call in microseconds, the median over loops of ``calls`` between synchronisations."""
    for _ in range(20):
        function()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(times)
