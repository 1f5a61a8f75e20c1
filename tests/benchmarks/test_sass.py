"""What the compiler makes of kernels, for a GPU that is not here: layouts in which their loops need few barriers."""

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from ssmscan.ops.cases import CASES

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton to compile with")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sass.py"


def _run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def _counts(op, name):
    """How many instructions of each kind the longest loop of a kernel has, and its bytes of stack."""
    from ssmscan.bench.kernels import forward_and_backward, launches

    [case] = [case for case in CASES if case.name == op]
    benchmark = case.benchmarks[0]
    call = case.call(benchmark.option, {**benchmark.size, "l": 512}).cast(benchmark.dtype)
    [launched] = [kernel for kernel in launches(90, forward_and_backward(call)) if kernel.name == name]
    kernel = launched.compiled(90)
    return kernel.longest_loop + Counter(stack=kernel.usage[1])


# A pipeline of copies takes two barriers, and a store of a tile through shared memory two.
@pytest.mark.parametrize(
    ("op", "kernel", "most"),
    [
        ("linear_scan", "linear_scan_backward", {"BAR": 10, "SHFL": 0, "stack": 0}),
        # One move for each decay.
        ("matrix_scan", "matrix_scan_forward", {"BAR": 4, "SHFL": 16, "stack": 0}),
        ("rg_lru", "rg_lru_forward", {"BAR": 8, "SHFL": 0, "stack": 0}),
        ("selective_scan", "selective_scan_walk", {"BAR": 4, "SHFL": 0, "stack": 0}),
        ("selective_scan", "selective_scan_backward", {"BAR": 8, "SHFL": 80, "stack": 64}),
        ("ssd", "ssd_state_gradients", {"BAR": 8, "stack": 0}),
        ("ssd", "ssd_pair_gradients", {"BAR": 8, "SHFL": 24, "stack": 128}),
        ("ssd_bidirectional", "ssd_state_gradients", {"BAR": 8, "stack": 0}),
    ],
)
def test_loops(op, kernel, most, compiler):
    found = compiler(_counts, op, kernel)
    # What is counted is the walk over tiles, not some other loop or none.
    assert found.total() - found["stack"] > 200
    assert {kind: found[kind] for kind in most if found[kind] > most[kind]} == {}


def test_sums_stay_where_they_are_loaded(compiler):
    """The sums of dB and dC over programs move between lanes after the loop, not in it."""
    found = compiler(_counts, "selective_scan", "separate_states")
    assert found["LDG"] >= 4
    assert not found["BAR"] + found["SHFL"] + found["stack"]


def test_prints():
    """What bounds a kernel, and the shared memory of an RTX 40."""
    printed = _run("s4d", "--variant", "recurrent, fp32", "--target", "89", "--kernel", "gram").stdout
    usage = r"s4d_gram: 8 warps, \d+ registers, \d+ bytes of stack, \d+ of 101376 bytes of shared memory"
    assert re.fullmatch(usage + r"\n  loop of \d+: .*\d+ LDGSTS\n", printed)


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        (["--variant", "none"], "--variant must be one of headline, ", ", got none."),
        (["--size", "n=256", "k=1"], "--size must set axes of b, l, h, p, g, n to numbers", ", got n=256 k=1."),
        (["--size", "n="], "--size must set axes of", ", got n=."),
        (["--target", "70"], "argument --target: invalid choice: 70", ")"),
    ],
)
def test_refuses_on_one_line(options, begin, end):
    failed = _run("ssd", *options)
    assert failed.returncode == 2
    assert begin in failed.stderr
    assert failed.stderr.rstrip().endswith(end)
