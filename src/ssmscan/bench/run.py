"""The runner: checks, times and records the benchmarks of operations."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan import backend as available
from ssmscan.bench import gate, measure
from ssmscan.bench.report import axes, show
from ssmscan.bench.result import DIRECTIONS, HEADLINE, STEP, SWEEP, Result, Row, commit, machine, now, versions
from ssmscan.shapes import error
from ssmscan.testing import Benchmark, Call, OpCase, Option, assert_close

# Inputs repeat after this many tokens, since drawing takes longer than timing. A prime: whatever is read from the wrong
# tile, segment or batch row has other values there, and the check at full size sees it.
TOKENS = 8191
# Lengths of the sweep, at the headline's number of tokens.
LENGTHS = tuple(2**k for k in range(10, 17))
# Batches of the decode steps.
BATCHES = (1, 64)
# The most elements of x at which further backends are timed, as baselines.
BASELINE = 2**23


def run_cases(
    cases: Sequence[OpCase], out: Path, device: str, backends: Sequence[str] = (), source: str | None = None
) -> bool:
    """Check and time the benchmarks of ``cases``, print their tables, and write ``out/<gpu>/<op>.json`` for each.

    Args:
        cases: the operations.
        out: the folder of results.
        device: "cuda" or "cpu".
        backends: as for :func:`backends_of`.
        source: the commit to record; None asks git.

    Returns:
        Whether all went well. Nothing is written of an operation with a row that is wrong or does not fit in memory.

    Raises:
        ValueError, RuntimeError: a named backend is unknown or cannot run.
    """
    chosen = [backends_of(case, device, backends) for case in cases]
    source = commit() if source is None else source
    copy = measure.rounded(measure.copy_gbps(device))
    well = True
    for case, names in zip(cases, chosen, strict=True):
        rows, failures = _measure(case, device, names, copy)
        if rows:
            host = host_times(case, names[0]) if device == "cuda" else None
            result = Result(machine(device), source, *versions(), now(), copy, host, tuple(rows))
            show(result)
            if not failures:
                print(result.write(out))
        for failure in failures:
            print(failure, file=sys.stderr)
        well = well and not failures
    return well


def backends_of(case: OpCase, device: str, wanted: Sequence[str] = ()) -> list[str]:
    """The backends to time: the first at every size, the others at small ones, as baselines.

    Without ``wanted``, the operation's best on ``device``. ValueError or RuntimeError when one of them cannot run.
    """
    if not wanted:
        best = available.choose(case.name, "auto", device, torch.float32)
        return [best if best in case.backends else "torch"]
    names = [available.choose(case.name, name, device, torch.float32) for name in wanted]
    for name in names:
        if name not in (*case.backends, "reference"):
            raise RuntimeError(error(case.name, f"backend must be one of {', '.join(case.backends)}", repr(name)))
    return names


def benchmarks_of(case: OpCase, device: str) -> list[Benchmark]:
    """The case's rows for ``device`` and, at the sizes of the first, decode steps and a sweep of lengths."""
    rows = [row for row in case.benchmarks if row.device == device]
    if not rows:
        return []
    headline = rows[0] = replace(rows[0], variant=HEADLINE)
    tokens = headline.size["b"] * headline.size["l"]
    steps = [
        replace(headline, variant=STEP, size={**headline.size, "b": batch, "l": 1})
        for batch in BATCHES
        if device == "cuda" and case.has(headline.option, "step")
    ]
    sweep = [
        replace(headline, variant=SWEEP, size={**headline.size, "b": tokens // length, "l": length}, graph=False)
        for length in LENGTHS
        if length <= tokens and length != headline.size["l"]
    ]
    return rows + steps + sweep


def _measure(case: OpCase, device: str, backends: Sequence[str], copy: float) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    failures = []
    checked: set[object] = set()
    for benchmark in benchmarks_of(case, device):
        chosen = _able(benchmark, backends)
        alone = benchmark.variant == STEP or _elements(case, benchmark) > BASELINE
        for backend in chosen[:1] if alone else chosen:
            label = f"bench: {case.name}, {benchmark.variant}, {axes(benchmark.size)}, {backend}"
            check = (*gate.small(benchmark.size).items(), benchmark.option, benchmark.dtype, backend)
            try:
                if check not in checked:
                    gate.check_small(case, benchmark, backend, device)
                    checked.add(check)
                if benchmark.variant == STEP:
                    new = _time_step(case, benchmark, backend, copy)
                else:
                    new = _time(case, benchmark, backend, device, copy)
            except AssertionError as wrong:
                failures.append(f"{label}: wrong results: {wrong}")
                continue
            except torch.OutOfMemoryError:
                failures.append(f"{label}: out of memory")
                continue
            rows += new
            print(label, *(f"{row.direction} {row.median_ms:.4g} ms" for row in new), file=sys.stderr)
    return rows, failures


def _time(case: OpCase, benchmark: Benchmark, backend: str, device: str, copy: float) -> list[Row]:
    call = draw(case, benchmark, device)
    with torch.no_grad():
        y = call.run(backend)["y"]
    dy = torch.randn(y.shape, dtype=y.dtype, device=device, generator=torch.Generator(device).manual_seed(2))
    gate.check_full(benchmark, backend, call, dy)

    given = sum(tensor.nbytes for tensor in call.tensors.values())
    # Forward: every argument is read and y is written. Backward: every argument and dy are read, gradients written.
    nbytes = {"fwd": given + y.nbytes, "fwdbwd": 3 * given + 2 * y.nbytes}
    del y
    sets = measure.input_sets(given + dy.nbytes, device)
    calls = [
        call.replace(**{name: tensor.clone().requires_grad_() for name, tensor in call.tensors.items()})
        for _ in range(sets)
    ]
    dys = [dy.clone() for _ in range(sets)]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return calls[i].run(backend)["y"]

    def forward_backward(i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(calls[i].run(backend)["y"], list(calls[i].tensors.values()), dys[i])

    rows = []
    for direction, function in zip(DIRECTIONS, (forward, forward_backward), strict=True):
        if benchmark.graph:
            timing = measure.time_graph(function, sets)
        else:
            timing = measure.time_calls(function, sets, device)
        floor = max(nbytes[direction] / copy / 1e6, _arithmetic_ms(case, benchmark, direction, device))
        rows.append(_row(case, benchmark, direction, backend, timing, floor, measure.peak_mib(function, device)))
    return rows


def _time_step(case: OpCase, benchmark: Benchmark, backend: str, copy: float) -> list[Row]:
    """Decode steps within a graph's replay, after the second of two tokens was found to give what a scan gives."""
    function = case.step
    assert function is not None
    call = case.call(benchmark.option, {**benchmark.size, "l": 2}).cast(benchmark.dtype, "cuda")
    whole = call.run(backend)
    token, h = call.each(lambda tensor: tensor[:, 1]), call.each(lambda tensor: tensor[:, :1]).run(backend)["h"]
    nbytes = sum(tensor.nbytes for tensor in token.tensors.values()) + whole["y"][:, 1].nbytes + 2 * h.nbytes
    sets = measure.input_sets(nbytes, "cuda")
    tokens = [call.replace(**{name: tensor.clone() for name, tensor in token.tensors.items()}) for _ in range(sets)]
    states = [h.clone() for _ in range(sets)]

    def step(i: int) -> Tensor:
        return function(**tokens[i].tensors, **call.keywords, h=states[i])

    with torch.no_grad():
        stepped = {"y": step(0)[:, None], "h": states[0]}
        assert_close(stepped, {"y": whole["y"][:, 1:], "h": whole["h"]}, benchmark.dtype)
        timing = measure.time_graph(step, sets)
    return [_row(case, benchmark, "fwd", "auto", timing, nbytes / copy / 1e6, measure.peak_mib(step, "cuda"))]


def _row(
    case: OpCase,
    benchmark: Benchmark,
    direction: str,
    backend: str,
    timing: measure.Timing,
    floor: float,
    peak: float | None,
) -> Row:
    return Row(
        op=case.name,
        shape=dict(benchmark.size),
        dtype=str(benchmark.dtype).removeprefix("torch."),
        direction=direction,
        backend=backend,
        variant=benchmark.variant,
        median_ms=measure.rounded(timing.median_ms),
        p20_ms=measure.rounded(timing.p20_ms),
        p80_ms=measure.rounded(timing.p80_ms),
        floor_ms=measure.rounded(floor),
        ratio_to_floor=measure.rounded(timing.median_ms / floor),
        peak_mib=None if peak is None else measure.rounded(peak),
    )


def draw(case: OpCase, benchmark: Benchmark, device: str) -> Call:
    """The benchmark's call, its tokens repeated from a short stream of them."""
    b, length = benchmark.size["b"], benchmark.size["l"]
    drawn = min(b * length, TOKENS)
    size = {**benchmark.size, "b": 1, "l": drawn}
    call = _stream(case, benchmark.option, tuple(size.items()), benchmark.dtype).to(device)

    def fill(tensor: Tensor) -> Tensor:
        repeats = -(-b * length // drawn)
        stream = tensor.repeat(1, repeats, *(1 for _ in tensor.shape[2:]))[:, : b * length]
        return stream.reshape(b, length, *tensor.shape[2:])

    return call.each(fill)


@lru_cache(maxsize=1)
def _stream(case: OpCase, option: Option, size: tuple[tuple[str, int], ...], dtype: torch.dtype) -> Call:
    """Tokens on the CPU; the rows of a sweep, one after the other, are of the same ones."""
    return case.call(option, dict(size)).cast(dtype)


def _able(benchmark: Benchmark, backends: Sequence[str]) -> Sequence[str]:
    """Those of ``backends`` that run the benchmark; an option without kernels of its own runs in PyTorch."""
    able = benchmark.option.backends
    return backends if able is None else [name for name in backends if name in able] or ["torch"]


def _elements(case: OpCase, benchmark: Benchmark) -> int:
    token = case.draw({**benchmark.size, "b": 1, "l": 1}, benchmark.option)
    return benchmark.size["b"] * benchmark.size["l"] * token["x"].numel()


def _arithmetic_ms(case: OpCase, benchmark: Benchmark, direction: str, device: str) -> float:
    """A floor above that of the bytes, where the case knows one; it is for the GPUs that the case is tuned for."""
    return 0.0 if case.floor_ms is None or device == "cpu" else case.floor_ms(benchmark.size, direction)


def host_times(case: OpCase, backend: str) -> dict[str, float]:
    """Host time of a tiny call of the case, and of attention beside it, in microseconds."""
    first = case.benchmarks[0]
    benchmark = case.host or replace(first, size={**gate.small(first.size), "b": 1, "l": 128})
    call = case.call(benchmark.option, benchmark.size).cast(benchmark.dtype, "cuda")
    chosen = _able(benchmark, (backend,))[0]
    tensors = [tensor.requires_grad_() for tensor in call.tensors.values()]
    ours = _host_us(lambda: call.run(chosen)["y"], tensors)
    return {name: measure.rounded(us) for name, us in {**ours, **_attention_us()}.items()}


@cache
def _attention_us() -> dict[str, float]:
    q, k, v = (torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    times = _host_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])
    return {f"sdpa {direction}": us for direction, us in times.items()}


def _host_us(function: Callable[[], Tensor], tensors: Sequence[Tensor]) -> dict[str, float]:
    dy = torch.randn_like(function())
    with torch.no_grad():
        forward = measure.host_us(function)
    return {"fwd": forward, "fwdbwd": measure.host_us(lambda: torch.autograd.grad(function(), tensors, dy))}
