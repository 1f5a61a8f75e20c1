"""How the host keeps ahead of a CUDA device: whole steps launched at once, results read after the next were queued."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# As many calls of a new shape come before a graph records one: kernels are compiled and launches settled by then.
_WARMUP = 3
# Graphs of one function; calls of further shapes run as they are.
_MOST = 16
# Steps that may be queued on a device before the host waits for the oldest.
_AHEAD = 2


class Recorded:
    """A function of tensors and dictionaries of them, launched as one CUDA graph for each shape of its arguments.

    The first calls of a shape run as they are, the next one is recorded. What the function reads beside its arguments
    (weights, states) must keep its addresses; what it does in Python happens in the first calls alone.

    Args:
        function: of one tensor and any number of dictionaries of tensors; returns a tensor.
        device: where all of them are.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls: dict[tuple[Any, ...], int] = {}
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.stream = torch.cuda.Stream(device)
        # One memory for all graphs: none runs beside another, and a result is copied before the next.
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, first: Tensor, *parts: dict[str, Tensor]) -> Tensor:
        with torch.cuda.device(self.device):
            return self._call(first, *parts)

    def _call(self, first: Tensor, *parts: dict[str, Tensor]) -> Tensor:
        given = [first, *(part for inputs in parts for part in inputs.values())]
        key = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key in self.graphs:
            graph, held, result = self.graphs[key]
            for place, tensor in zip(held, given, strict=True):
                place.copy_(tensor, non_blocking=True)
            graph.replay()
            return result.clone()
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= _WARMUP or len(self.graphs) == _MOST:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(first, *parts)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream):
            result = self.function(first, *parts)
        self.graphs[key] = graph, given, result
        graph.replay()
        return result.clone()


class Late:
    """Tensors of the steps, read once the device has computed them: the host stays a step or two ahead of it."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, result: Tensor) -> None:
        """Ask for the ``result`` of ``step``."""
        event = None
        if result.is_cuda:
            stream = torch.cuda.current_stream(result.device)
            result = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        self._queue.append((step, result, event))

    def take(self, everything: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The steps whose results are there, oldest first, and these on the CPU; waits for ``everything`` if told."""
        while self._queue:
            step, result, event = self._queue[0]
            if event is not None and not event.query():
                if not everything and len(self._queue) <= _AHEAD:
                    return
                event.synchronize()
            self._queue.popleft()
            yield step, result
