"""Time the tiles that GPUs with less shared memory take, on the GPU at hand: ``python benchmarks/limits.py [OP …]``.

Every operation whose launch configurations depend on the shared memory that a program may have, with that of each
architecture: first checked, then forward, and forward and backward. What it prints is the cost of the smaller tiles
alone; the GPUs that need them differ in all else too.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from ssmscan.bench import gate, measure
from ssmscan.bench.kernels import limited
from ssmscan.bench.report import axes
from ssmscan.bench.run import draw
from ssmscan.ops._triton.device import ARCHITECTURES
from ssmscan.ops.cases import CASES
from ssmscan.testing import Benchmark, OpCase

# Of each operation a variant of its benchmarks, and what is changed in its size.
ROWS: list[tuple[str, str, dict[str, int]]] = [
    ("ssd", "headline", {}),
    ("ssd", "headline", {"h": 32, "n": 256}),
    ("ssd", "fp32", {"b": 2}),
    ("ssd", "fp32", {"b": 2, "h": 32, "n": 256}),
    ("ssd_bidirectional", "headline", {}),
    ("s4d", "recurrent", {}),
    ("s4d", "recurrent, real", {}),
    ("s4d", "recurrent, fp32", {}),
]


def chosen(op: str, variant: str, size: dict[str, int]) -> tuple[OpCase, Benchmark]:
    [case] = [case for case in CASES if case.name == op]
    [benchmark] = [benchmark for benchmark in case.benchmarks if benchmark.variant == variant]
    return case, replace(benchmark, size={**benchmark.size, **size})


def times(op: str, variant: str, size: dict[str, int], shared: int) -> tuple[float, float]:
    """The ms of a forward, and of a forward and backward, with so many bytes for a program."""
    case, benchmark = chosen(op, variant, size)
    with limited(shared):
        gate.check_small(case, benchmark, "triton", "cuda")
        call = draw(case, benchmark, "cuda")
        tensors = [tensor.requires_grad_() for tensor in call.tensors.values()]
        dy = torch.randn_like(call.run("triton")["y"])

        def forward(_: int) -> None:
            with torch.no_grad():
                call.run("triton")

        def forward_backward(_: int) -> None:
            torch.autograd.grad(call.run("triton")["y"], tensors, dy)

        forth, both = (measure.time_calls(function, 1, "cuda") for function in (forward, forward_backward))
        return forth.median_ms, both.median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the tiles that GPUs with less shared memory take.")
    known = sorted({op for op, _, _ in ROWS})
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(known)}; all unless given")
    wanted = parser.parse_args().ops or known
    for op in wanted:
        if op not in known:
            parser.error(f"OP must be of {', '.join(known)}, got {op}.")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; ms of forward, and of forward and backward")
    limits = sorted({given.shared for given in ARCHITECTURES.values()}, reverse=True)
    for op, variant, size in ROWS:
        if op not in wanted:
            continue
        _, benchmark = chosen(op, variant, size)
        print(f"{op}, {variant}, {axes(benchmark.size)}")
        first = None
        for shared in limits:
            # What was chosen for a call is remembered, so each limit has a process of its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                took = process.submit(times, op, variant, size, shared).result()
            first = first or took
            names = ", ".join(f"sm_{number}" for number, given in ARCHITECTURES.items() if given.shared == shared)
            ratios = " and ".join(f"{ms / full:.2f}" for ms, full in zip(took, first, strict=True))
            print(f"  {shared:7} bytes ({names}): {took[0]:.4g} and {took[1]:.4g}, {ratios} times", flush=True)


if __name__ == "__main__":
    main()
