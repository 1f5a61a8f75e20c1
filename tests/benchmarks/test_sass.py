"""What the compiler makes of kernels, for a GPU that is not here: layouts in which their loops need few barriers."""

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton to compile with")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sass.py"


def counts(op: str, kernel: str) -> Counter:
    """How many instructions of each kind the longest loop of this kernel has, and the bytes that the kernel spills."""
    command = [sys.executable, SCRIPT, op, "--kernel", kernel]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    header, loop = printed.splitlines()
    assert header.startswith(kernel)
    # What is counted is the walk over tiles, not some other loop or none.
    assert int(re.search(r"loop of (\d+)", loop)[1]) > 200
    kinds = {kind: int(count) for count, kind in re.findall(r"(\d+) ([A-Z]+)", loop)}
    return Counter(kinds, spilled=int(re.search(r"(\d+) bytes spilled", header)[1]))


# A pipeline of copies takes two barriers, and a store of a tile through shared memory two.
@pytest.mark.parametrize(
    ("op", "kernel", "most"),
    [
        ("linear_scan", "linear_scan_backward", {"BAR": 10, "SHFL": 0, "spilled": 0}),
        # One move for each decay.
        ("matrix_scan", "matrix_scan_forward", {"BAR": 4, "SHFL": 16, "spilled": 0}),
        ("rg_lru", "rg_lru_forward", {"BAR": 8, "SHFL": 0, "spilled": 0}),
        ("selective_scan", "selective_scan_walk", {"BAR": 4, "SHFL": 0, "spilled": 0}),
        ("selective_scan", "selective_scan_backward", {"BAR": 8, "SHFL": 80, "spilled": 64}),
        ("ssd", "ssd_state_gradients", {"BAR": 8, "spilled": 0}),
        ("ssd", "ssd_pair_gradients", {"BAR": 8, "SHFL": 24, "spilled": 128}),
        ("ssd_bidirectional", "ssd_state_gradients", {"BAR": 8, "spilled": 0}),
    ],
)
def test_loops(op, kernel, most):
    found = counts(op, kernel)
    assert {kind: found[kind] for kind in most if found[kind] > most[kind]} == {}


def test_shared_memory():
    """What takes most of it, float32 with 256 states, fits into a multiprocessor."""
    command = [sys.executable, SCRIPT, "ssd", "--variant", "fp32", "--size", "n=256", "--kernel", "gradients"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [int(count) for count in re.findall(r"(\d+) bytes of shared memory", printed)]
    assert len(needed) == 3
    assert max(needed) <= 227 << 10


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        (["--variant", "none"], "--variant must be one of headline, ", ", got none."),
        (["--size", "n=256", "k=1"], "--size must set axes of b, l, h, p, g, n to numbers", ", got n=256 k=1."),
        (["--size", "n="], "--size must set axes of", ", got n=."),
    ],
)
def test_refuses_on_one_line(options, begin, end):
    failed = subprocess.run([sys.executable, SCRIPT, "ssd", *options], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert begin in failed.stderr
    assert failed.stderr.rstrip().endswith(end)
