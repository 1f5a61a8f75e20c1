"""The papers' figures of the operations themselves: scans against what they replace.

scan_length: a state-space model of 1024 channels, by selective_scan with 16 states for each and by ssd with 128,
against a convolution as long as the sequence, by the FFT, and against causal attention with heads of 64 channels;
bfloat16, one sequence. The convolution is given its kernel, and transforms it with the input, in float32.

naive: selective_scan in float32, 4 sequences of 1536 channels with 16 states, against the recurrence written as a loop
over the tokens in Python, and against the best that PyTorch's own operations do.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssmscan.bench import gate
from ssmscan.bench.measure import peak_mib, rounded
from ssmscan.bench.models.experiment import LeftOutError, Planned, Row, Settings
from ssmscan.bench.models.timing import call_ms
from ssmscan.bench.result import DIRECTIONS
from ssmscan.bench.run import draw
from ssmscan.ops.selective_scan import case as selective_scan
from ssmscan.ops.ssd import case as ssd
from ssmscan.testing import Benchmark, OpCase, Option, Size

HEAD = 64
# A call that would take longer is left out (seconds).
PATIENCE = {"scan_length": 2.0, "naive": 4.0}


class Work(NamedTuple):
    """A function and its inputs, in all of which it is differentiated."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


class Operation(NamedTuple):
    """``work`` makes it for a batch, a length and a device; its time grows as the length to the power of ``order``.

    ``check`` compares it with a reference, on a device; AssertionError where it is wrong.
    """

    work: Callable[[int, int, str], Work]
    order: int = 1
    check: Callable[[str], None] = lambda device: None


def convolution(x: Tensor, k: Tensor) -> Tensor:
    """y_t = Σ_j k_j x_{t-j} for each channel, x and k (…, d, l), in float32."""
    l = x.shape[-1]
    # Twice as long, since the product of transforms is a convolution in a circle.
    transform = torch.fft.rfft(x.float(), 2 * l) * torch.fft.rfft(k.float(), 2 * l)
    return torch.fft.irfft(transform, 2 * l)[..., :l].to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (b, h, l, p), on a GPU by the kernel that keeps no matrix of pairs."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _convolution(d: int, batch: int, length: int, device: str) -> Work:
    x = torch.randn(batch, d, length, device=device, dtype=torch.bfloat16)
    return Work(convolution, (x, torch.randn(d, length, device=device)))


def _attention(d: int, batch: int, length: int, device: str) -> Work:
    shape = (3, batch, d // HEAD, length, HEAD)
    return Work(attention, torch.randn(shape, device=device, dtype=torch.bfloat16).unbind())


def _ours(case: OpCase, size: Size, option: Option, dtype: torch.dtype, backend: str = "auto") -> Operation:
    """An operation of the library, of a size but for batch and length."""

    def benchmark(batch: int, length: int) -> Benchmark:
        return Benchmark("", {"b": batch, "l": length, **size}, option, dtype)

    def work(batch: int, length: int, device: str) -> Work:
        call = draw(case, benchmark(batch, length), device)

        def function(*inputs: Tensor) -> Tensor:
            return call.replace(**dict(zip(call.tensors, inputs, strict=True))).run(backend)["y"]

        # Those of the CPU are drawn once for several calls.
        return Work(function, tuple(tensor.detach() for tensor in call.tensors.values()))

    return Operation(work, check=lambda device: gate.check_small(case, benchmark(2, gate.SMALL["l"]), backend, device))


_SELECTIVE_SCAN = partial(_ours, selective_scan.CASE)
OPERATIONS = {
    "scan_length": {
        "selective_scan": _SELECTIVE_SCAN({"d": 1024, "n": 16}, selective_scan.UNGATED, torch.bfloat16),
        "ssd": _ours(ssd.CASE, {"h": 16, "p": HEAD, "g": 1, "n": 128}, ssd.LAYER, torch.bfloat16),
        "convolution": Operation(partial(_convolution, 1024)),
        "attention": Operation(partial(_attention, 1024), order=2),
    },
    "naive": {
        "loop": _SELECTIVE_SCAN({"d": 1536, "n": 16}, selective_scan.UNGATED, torch.float32, "reference"),
        "torch": _SELECTIVE_SCAN({"d": 1536, "n": 16}, selective_scan.UNGATED, torch.float32, "torch"),
        "selective_scan": _SELECTIVE_SCAN({"d": 1536, "n": 16}, selective_scan.UNGATED, torch.float32),
    },
}


class Line:
    """One operation in one direction, at growing lengths."""

    def __init__(self, operation: Operation, direction: str, patience: float, device: str) -> None:
        self.operation, self.direction, self.patience, self.device = operation, direction, patience, device
        # The last length that was timed, and its time in seconds.
        self.last: tuple[int, float] | None = None

    def measure(self, batch: int, length: int) -> Row:
        """The time of a call, and the memory that it takes beside its inputs."""
        if self.last is None:
            self.operation.check(self.device)
        else:
            expected = self.last[1] * (length / self.last[0]) ** self.operation.order
            if expected > self.patience:
                raise LeftOutError(f"a call would take {expected:.1f} s")
        call = _call(self.operation.work(batch, length, self.device), self.direction)
        ms = call_ms(call, self.device)
        self.last = length, ms / 1e3
        mib = peak_mib(lambda _: call(), self.device)
        return {"ms": rounded(ms), "peak_gib": None if mib is None else rounded(mib / 2**10)}


def _call(work: Work, direction: str) -> Callable[[], object]:
    """The forward without gradients, or with those of all inputs."""
    function, inputs = work

    @torch.no_grad()
    def forward() -> Tensor:
        return function(*inputs)

    if direction == "fwd":
        return forward
    dy = torch.randn_like(forward())
    for tensor in inputs:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(function(*inputs), inputs, dy)


def over_length(figure: str, settings: Settings) -> Iterator[Planned]:
    """Every operation of a figure, forward and with the backward, at all lengths."""
    for name, direction, batch in product(settings.models, DIRECTIONS, settings.batches):
        line = Line(OPERATIONS[figure][name], direction, PATIENCE[figure], settings.device)
        for length in sorted(settings.lengths):
            about = {"figure": figure, "line": name, "direction": direction, "batch": batch, "length": length}
            yield about, partial(line.measure, batch, length)
