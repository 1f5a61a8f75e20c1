"""An operation's kernels as compiled for a GPU that need not be here.

For a process in which ``TRITON_INTERPRET`` is not set when the package is imported. ptxas comes with Triton, in two
builds: from compute capability 10.0 on the newer one compiles.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info

import ssmscan.backend
from ssmscan.ops import decoding
from ssmscan.ops._triton import device
from ssmscan.ops._triton.launch import Kernel
from ssmscan.ops._triton.record import Recorded
from ssmscan.testing import Call

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launched(NamedTuple):
    """A kernel as it was launched; no more of its tensors than what Triton specialises on."""

    function: Any
    arguments: tuple[Any, ...]
    warps: int
    registers: int | None

    @property
    def name(self) -> str:
        return self.function.__name__

    def source(self) -> ASTSource:
        """What Triton compiles for these arguments, all tensors being aligned."""
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.function.params, self.arguments, strict=True)):
            if parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.dtype):
                signature[parameter.name], attributes[(i,)] = f"*{TYPES[value]}", [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.function, signature=signature, constexprs=constants, attrs=attributes)

    def compiled(self, architecture: int) -> "Compiled":
        options = {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})
        target = GPUTarget("cuda", architecture, 32)
        # Kernels ask for the architecture of a GPU that is here.
        with patch.object(target_info, "current_target", lambda: target):
            kernel = triton.compile(self.source(), target=target, options=options)
        return Compiled(self, kernel.metadata.shared, kernel.asm)


class Compiled:
    """What came of a kernel: ``shared`` are the bytes of shared memory that a program takes."""

    def __init__(self, launched: Launched, shared: int, asm: Any) -> None:
        self.launched, self.shared, self.asm = launched, shared, asm

    @cached_property
    def usage(self) -> tuple[int, int]:
        """The registers of a thread, and the bytes of its stack, which are mostly registers spilled to memory."""
        [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", self._dump("-res-usage"))
        return int(registers), int(stack)

    @cached_property
    def sass(self) -> str:
        return self._dump("-sass")

    @cached_property
    def longest_loop(self) -> Counter[str]:
        """How many instructions of each kind stand from the target of a jump back to the jump, where most do."""
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", self.sass, re.MULTILINE)
        at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        best = range(0)
        for end, (address, instruction) in enumerate(lines):
            target = re.match(r"BRA.*?0x([0-9a-f]+)", instruction)
            begin = at.get(int(target[1], 16), end) if target and int(target[1], 16) < int(address, 16) else end
            best = max(best, range(begin, end + 1), key=len)
        return Counter(lines[i][1].split()[0].split(".")[0] for i in best)

    def _dump(self, option: str) -> str:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.asm["cubin"])
            return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


@contextmanager
def limited(shared: int) -> Iterator[None]:
    """As on a GPU that gives a program so many bytes of shared memory; for calls of sizes that are new in a process."""
    with patch.object(device, "shared_memory", lambda _: shared):
        yield


def launches(architecture: int, run: Callable[[], object]) -> list[Launched]:
    """The kernels that ``run``, which works on tensors of the CPU, would launch on a GPU, each once, in order."""
    launched: list[Launched] = []

    def launch(kernel, grid, tensors, integers, constants, warps, registers=None):
        types = (None if t is None else t.dtype for t in tensors)
        launched.append(Launched(kernel.function, (*types, *integers, *constants), warps, registers))

    with (
        limited(device.ARCHITECTURES[architecture].shared),
        patch.object(ssmscan.backend, "why_not", lambda *_: None),
        patch.object(decoding, "choose", lambda *_: "triton"),
        patch.object(Kernel, "launch", launch),
        patch.object(Recorded, "__call__", lambda recorded, *arguments: recorded.function(*arguments)),
    ):
        run()
    return list(dict.fromkeys(launched))


def forward_and_backward(call: Call) -> Callable[[], None]:
    """A run of ``call`` with the gradients of all of its tensors, of y and, with an initial state, of the final one."""

    def run() -> None:
        given = call.replace(**{name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()})
        outputs = [output for name, output in given.run("triton").items() if name == "y" or "h0" in call.tensors]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    return run


def step(call: Call, h: Tensor) -> Callable[[], Tensor]:
    """A decode step with the first token of ``call``, and the state ``h``."""
    step, sequence = call.case.step, call.case.sequence
    assert step is not None
    token = {name: t[:, 0] if name in sequence else t for name, t in call.tensors.items() if name != "h0"}
    return lambda: step(**token, **call.keywords, h=h)
