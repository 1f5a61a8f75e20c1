"""Compile an operation's kernels for a GPU that need not be here, and print what bounds them.

    python benchmarks/sass.py ssd --variant fp32 --size n=256 --kernel gradients --keep /tmp/ssd

For each kernel of a forward and backward: registers, bytes spilled, shared memory, and of its longest loop how many
instructions it has, in all and of the kinds that cost most: barriers, moves between lanes, through shared memory and to
spilled registers. Needs a Triton that brings ptxas and cuobjdump; what it compiles is what that version makes of them.
"""

import argparse
import os
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

# Kernels are to be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ssmscan.backend
from ssmscan.ops._triton.launch import Kernel
from ssmscan.ops.cases import CASES
from ssmscan.testing import Benchmark, OpCase

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
KINDS = ("BAR", "SHFL", "STS", "LDS", "LDSM", "LDG", "LDGSTS", "STG", "LDL", "STL", "MUFU", "HGMMA")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Of a variant's call at most so many tokens, a multiple of every tile's: what is compiled does not depend on more.
TOKENS = 512


class Launched(NamedTuple):
    """A kernel as it was launched; no more of its tensors than what Triton specialises on."""

    function: Any
    arguments: tuple[Any, ...]
    warps: int
    registers: int | None

    @property
    def name(self) -> str:
        return self.function.__name__


def source(launched: Launched) -> ASTSource:
    """What Triton compiles for these arguments, all tensors being aligned."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launched.function.params, launched.arguments, strict=True)):
        if parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[parameter.name], attributes[(i,)] = f"*{TYPES[value]}", [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launched.function, signature=signature, constexprs=constants, attrs=attributes)


def launches(case: OpCase, benchmark: Benchmark) -> list[Launched]:
    """The kernels that a forward and backward launch, each once, in order."""
    launched: list[Launched] = []

    def launch(kernel, grid, tensors, integers, constants, warps, registers=None):
        types = (None if t is None else t.dtype for t in tensors)
        launched.append(Launched(kernel.function, (*types, *integers, *constants), warps, registers))

    call = case.call(benchmark.option, benchmark.size).cast(benchmark.dtype, "cpu")
    call = call.replace(**{name: tensor.requires_grad_() for name, tensor in call.tensors.items()})
    # Nothing runs, so tensors of the CPU do.
    with patch.object(ssmscan.backend, "why_not", lambda *_: None), patch.object(Kernel, "launch", launch):
        y = call.run("triton")["y"]
        y.backward(torch.ones_like(y))
    return list(dict.fromkeys(launched))


def longest_loop(sass: str) -> list[str]:
    """The instructions from the target of a jump back to the jump, the most that there are."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", sass, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    best: list[str] = []
    for end, (address, instruction) in enumerate(lines):
        target = re.match(r"BRA.*?0x([0-9a-f]+)", instruction)
        begin = at.get(int(target[1], 16), end) if target and int(target[1], 16) < int(address, 16) else end
        if end - begin > len(best):
            best = [text for _, text in lines[begin : end + 1]]
    return best


def report(launched: Launched, target: int, folder: Path) -> str:
    """Compile, write what came of it to ``folder``, and say what bounds it."""
    options = {"num_warps": launched.warps} | ({} if launched.registers is None else {"maxnreg": launched.registers})
    compiled = triton.compile(source(launched), target=GPUTarget("cuda", target, 32), options=options)
    path = folder / f"{launched.name}.{sum(1 for _ in folder.glob(f'{launched.name}.*.cubin'))}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage, sass = (
        subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    path.with_suffix(".sass").write_text(sass)
    path.with_suffix(".ttgir").write_text(compiled.asm["ttgir"])
    [(registers, spilled)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    loop = longest_loop(sass)
    kinds = Counter(instruction.split()[0].split(".")[0] for instruction in loop)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
    return (
        f"{launched.name}: {launched.warps} warps, {registers} registers, {spilled} bytes spilled, "
        f"{compiled.metadata.shared} bytes of shared memory\n  loop of {len(loop)}: {counts}"
    )


def main() -> None:
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=cases, help="the operation")
    parser.add_argument("--variant", help="of its benchmarks (default: the first)")
    parser.add_argument("--size", nargs="*", default=[], metavar="AXIS=NUMBER", help="in place of the variant's")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels with such a name")
    parser.add_argument("--target", type=int, default=90, help="compute capability times ten (default: %(default)s)")
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
    benchmark = replace(benchmark, size=size)
    with TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for launched in launches(case, benchmark):
            if re.search(given.kernel, launched.name):
                print(report(launched, given.target, folder), flush=True)


if __name__ == "__main__":
    main()
