"""Compile an operation's kernels for a GPU that need not be here, and print what bounds them.

    python benchmarks/sass.py ssd --variant fp32 --size n=256 --kernel gradients --target 86 --keep /tmp/ssd

For each kernel of a forward and backward: registers, bytes of stack (mostly of spilled registers), shared memory and
how much of it the target has, and of its longest loop how many instructions it has, in all and of the kinds that cost
most: barriers, moves between lanes, through shared memory and to the stack. Needs a Triton that brings ptxas and
cuobjdump; what it compiles is what that version makes of them.
"""

import argparse
import os
import re
from pathlib import Path

# Kernels are to be compiled.
os.environ.pop("TRITON_INTERPRET", None)

from ssmscan.bench.kernels import Compiled, forward_and_backward, launches
from ssmscan.ops._triton.device import ARCHITECTURES
from ssmscan.ops.cases import CASES

KINDS = ("BAR", "SHFL", "STS", "LDS", "LDSM", "LDG", "LDGSTS", "STG", "LDL", "STL", "MUFU", "HGMMA")
# Of a variant's call at most so many tokens, a multiple of every tile's: what is compiled does not depend on more.
TOKENS = 512


def report(kernel: Compiled, limit: int) -> str:
    """What bounds a kernel; a program may have as many bytes of shared memory as ``limit``."""
    registers, stack = kernel.usage
    loop = kernel.longest_loop
    counts = ", ".join(f"{loop[kind]} {kind}" for kind in KINDS if loop[kind])
    return (
        f"{kernel.launched.name}: {kernel.launched.warps} warps, {registers} registers, {stack} bytes of stack, "
        f"{kernel.shared} of {limit} bytes of shared memory\n  loop of {loop.total()}: {counts}"
    )


def keep(kernel: Compiled, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = kernel.launched.name
    path = folder / f"{name}.{sum(1 for _ in folder.glob(f'{name}.*.cubin'))}.cubin"
    path.write_bytes(kernel.asm["cubin"])
    path.with_suffix(".sass").write_text(kernel.sass)
    path.with_suffix(".ttgir").write_text(kernel.asm["ttgir"])


def main() -> None:
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=cases, help="the operation")
    parser.add_argument("--variant", help="of its benchmarks (default: the first)")
    parser.add_argument("--size", nargs="*", default=[], metavar="AXIS=NUMBER", help="in place of the variant's")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels with such a name")
    parser.add_argument(
        "--target", type=int, choices=ARCHITECTURES, default=90, help="compute capability times ten (default: 90)"
    )
    parser.add_argument("--keep", type=Path, help="folder for the compiled kernels; without it, they are not kept")
    given = parser.parse_args()
    case = cases[given.op]
    benchmarks = {
        benchmark.variant: benchmark
        for benchmark in case.benchmarks
        if benchmark.device == "cuda" and "triton" in (benchmark.option.backends or ("triton",))
    }
    variant = given.variant or next(iter(benchmarks))
    if variant not in benchmarks:
        parser.error(f"--variant must be one of {', '.join(benchmarks)}, got {variant}.")
    benchmark = benchmarks[variant]
    size = {**benchmark.size, "l": min(benchmark.size["l"], TOKENS)}
    for text in given.size:
        axis, _, number = text.partition("=")
        if axis not in size or not number.isdecimal():
            parser.error(f"--size must set axes of {', '.join(size)} to numbers, got {' '.join(given.size)}.")
        size[axis] = int(number)
    call = case.call(benchmark.option, size).cast(benchmark.dtype)
    for launched in launches(given.target, forward_and_backward(call)):
        if re.search(given.kernel, launched.name):
            kernel = launched.compiled(given.target)
            print(report(kernel, ARCHITECTURES[given.target].shared), flush=True)
            if given.keep:
                keep(kernel, given.keep)


if __name__ == "__main__":
    main()
