"""Several processes for a test, started from one that has imported everything."""

import multiprocessing

import torch.multiprocessing as mp


def start(worker, ranks, folder):
    """Run ``worker(rank, ranks, folder)`` in so many processes, to the end."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ssmscan.distributed", "ssmscan.models.modeling", "ssmscan.testing"])
    mp.start_processes(worker, (ranks, str(folder)), ranks, start_method="forkserver")
