"""Running the parts of a kernel on threads: that all run, that several run at once, and that none has to.

The kernels here are Python's: :func:`run` calls any function.
"""

import multiprocessing
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from ssmscan.ops._numba import parallel
from ssmscan.ops._numba.parallel import run

PARTS = [(i,) for i in range(50)]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _count(counts, i):
    counts[i] += 1


def _meet(barrier, i):
    barrier.wait(60)


def test_every_part_runs_once():
    counts = np.zeros(len(PARTS))
    for _ in range(100):
        run(_count, PARTS, counts)
    assert counts.tolist() == [100] * len(PARTS)


def test_nothing_to_do():
    run(_count, [], np.zeros(0))


@pytest.mark.parametrize("threads", [2, 5, 3])
def test_parts_run_at_once(threads):
    """As many as PyTorch has threads, after fewer and after more; with fewer none would get through."""
    torch.set_num_threads(threads)
    run(_meet, PARTS[:threads], threading.Barrier(threads))


def test_no_thread_can_be_had(monkeypatch):
    """As at the end of a process. The caller runs what nobody takes from it."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(parallel, "_helpers", parallel._Helpers())
    counts = np.zeros(len(PARTS))
    run(_count, PARTS, counts)
    assert counts.tolist() == [1] * len(PARTS)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure(failing):
    """In the caller's part or a helper's; the other part has ended when the error is raised."""
    barrier, counts = threading.Barrier(2), np.zeros(2)

    def kernel(i):
        barrier.wait(60)
        if i == failing:
            raise ValueError(i)
        time.sleep(0.05)
        counts[i] += 1

    with pytest.raises(ValueError, match=str(failing)):
        run(kernel, PARTS[:2])
    assert counts.sum() == 1
    run(_count, PARTS, np.zeros(len(PARTS)))


def test_arguments_are_let_go():
    counts = np.zeros(len(PARTS))
    memory = weakref.ref(counts)
    run(_count, PARTS, counts)
    del counts
    # A helper that came too late may still look at the job.
    for _ in range(1000):
        if memory() is None:
            return
        time.sleep(0.01)
    pytest.fail("something still holds the arguments")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_threads_after_a_fork():
    run(_meet, PARTS[:2], threading.Barrier(2))
    child = multiprocessing.get_context("fork").Process(target=run, args=(_meet, PARTS[:2], threading.Barrier(2)))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    run(_meet, PARTS[:2], threading.Barrier(2))


def test_when_the_main_thread_has_ended():
    """In a thread that outlives it, and in what Python calls at its end; with and without helpers from before."""
    code = """
import atexit, sys, threading, torch
from ssmscan import linear_scan

torch.set_num_threads(2)
x, a = torch.ones(4, 20, 6, requires_grad=True), torch.full((4, 20, 6), 0.5)

def call(when):
    y, h = linear_scan(x, a, backend="cpu")
    (gradient,) = torch.autograd.grad(h.sum() + y.sum(), x)
    print(when, h[0, 0].item() == 2 - 2**-19, gradient[0, -1, 0].item() == 2)

def later():
    threading.main_thread().join()
    call("thread")

if sys.argv[1] == "before":
    call("main")
atexit.register(call, "exit")
threading.Thread(target=later).start()
"""
    for helpers in ("before", "none"):
        ended = subprocess.run([sys.executable, "-c", code, helpers], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr == ""
        main = ["main True True"] * (helpers == "before")
        assert ended.stdout.splitlines() == [*main, "thread True True", "exit True True"]
