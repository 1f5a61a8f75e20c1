"""Several processes for a test, started from one that has imported everything, and what each of them calls."""

import multiprocessing
from collections import Counter

import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


def start(worker, ranks, folder):
    """Run ``worker(rank, ranks, folder)`` in so many processes, to the end."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ssmscan.distributed", "ssmscan.models.modeling", "ssmscan.testing"])
    mp.start_processes(worker, (ranks, str(folder)), ranks, start_method="forkserver")


class Calls(TorchDispatchMode):
    """Counts the operators that are called meanwhile."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[function] += 1
        return function(*arguments, **(keywords or {}))
