"""Kernels run on threads of our own, without Numba's parallel layers.

A kernel is compiled with ``nogil=True`` and works on one part of the output; the parts are disjoint. Numba's own layers
abort when two Python threads enter at once (workqueue) or need a system library (omp), and would change the threading
of a user's other Numba code.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread, main_thread

import torch


class _Job:
    """One call of a kernel, in parts that several threads take one after the other."""

    def __init__(self, kernel: Callable[..., None], parts: Sequence[tuple[int, ...]], arguments: tuple) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.parts, self.count = deque(parts), len(parts)
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(self) -> None:
        """Run parts until none is left to begin."""
        while True:
            try:
                part = self.parts.popleft()
            except IndexError:
                return
            failure = None
            try:
                self.kernel(*self.arguments, *part)
            except BaseException as error:
                failure = error
            self.done.put(failure)

    def wait(self) -> None:
        """Until every part has ended; raise what the first to fail raised."""
        failures = [self.done.get() for _ in range(self.count)]
        for failure in failures:
            if failure is not None:
                raise failure


class _Helpers:
    """Threads that help the callers, and without which these do all the work themselves.

    So a call needs none of them: also not at the end of the process, when no more thread can be started.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.count = 0
        self.lock = Lock()

    def call(self, job: _Job, count: int) -> None:
        with self.lock:
            while self.count < count:
                try:
                    Thread(target=_help, args=(self.jobs,), name=f"ssmscan-{self.count}", daemon=True).start()
                except RuntimeError:
                    break
                self.count += 1
        for _ in range(min(count, self.count)):
            self.jobs.put(job)


def _help(jobs: SimpleQueue[_Job]) -> None:
    while True:
        # No name for the job: it would keep the tensors alive until the next one comes.
        jobs.get().work()


_helpers = _Helpers()


def _forget_helpers() -> None:
    """Threads do not survive a fork; the child starts its own when it needs them."""
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def run(kernel: Callable[..., None], parts: Sequence[tuple[int, ...]], *arguments: object) -> None:
    """Call ``kernel(*arguments, *part)`` for every part, on as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), len(parts))
    # After the main thread's end Python may stop at any moment, and a helper that it stops in a kernel aborts it all.
    if threads <= 1 or not main_thread().is_alive():
        for part in parts:
            kernel(*arguments, *part)
        return
    job = _Job(kernel, parts, arguments)
    _helpers.call(job, threads - 1)
    job.work()
    job.wait()


def split(n: int, d: int, widest: int = 4096, narrowest: int = 16) -> list[tuple[int, int, int]]:
    """Cut n rows of d channels into parts (row, first channel, end), enough for every thread and none too wide.

    A part keeps as many channels as it can: the processor prefetches along them.
    """
    pieces = -(-torch.get_num_threads() // max(n, 1))
    width = max(min(-(-d // pieces), widest), narrowest)
    return [(i, j, min(j + width, d)) for i in range(n) for j in range(0, d, width)]


def split_step(b: int, d: int, least: int) -> list[tuple[int, int, int, int]]:
    """Cut the channels of b batch rows into parts (row, end, first channel, end), of at least so many channels.

    All rows are one part where that is not more: a call of a kernel costs as much as it computes for some hundreds.
    """
    if b * d <= least:
        return [(0, b, 0, d)] if b * d else []
    return [(i, i + 1, first, end) for i, first, end in split(b, d, narrowest=least)]
