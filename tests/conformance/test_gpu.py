"""What only a GPU shows: lengths and outputs past int32, peak memory, Inductor, CUDA graphs, runs that must agree."""

from math import prod

import pytest
import torch

from ssmscan.testing import Setting, assert_close, assert_same_bits, differentiate, draw_cotangents

GPU = pytest.mark.grid(first=True, cuda_only=True)
GiB = 2**30


def _setting(case, option):
    return Setting("h0", h0=case.has(option, "h0"))


def _needs_memory(gibibytes):
    if torch.cuda.get_device_properties(0).total_memory < gibibytes * GiB:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


@pytest.mark.grid(cuda_only=True)
def test_five_runs(case, option, backend, dtype, device):
    """At the largest size, where the programs of a launch finish in any order."""
    call = case.call(option, case.large[-1], _setting(case, option)).cast(dtype, device)
    first = call.differentiate(backend)
    for _ in range(4):
        assert_same_bits(call.differentiate(backend), first)


# A prime, so that an offset that wrapped would read another value.
PERIOD = 4093


@pytest.mark.grid(first=True, cuda_only=True, needs=("h0", "split"), dtypes=(torch.bfloat16,))
def test_one_long_sequence(case, option, backend, device, dtype, memory):
    """2^30 elements (2^24 tokens of 64 channels), against the torch backend in float64, piece by piece."""
    _needs_memory(60)
    size = {**case.large[0], "b": 1, "l": PERIOD}
    if "d" in size:
        size["d"] = 64
    drawn = case.call(option, size, Setting("h0", h0=True)).cast(dtype, device)
    length = 2**30 // drawn.tensors["x"][0, 0].numel()
    # What a piece takes in float64 can be as large as its states.
    piece = max(2**24 // drawn.tensors["h0"].numel(), 2**13)
    repeats = -(-length // PERIOD)

    def lengthened(tensor):
        return torch.cat([tensor] * repeats, 1)[:, :length]

    call = drawn.each(lengthened)
    dy = lengthened(draw_cotangents(drawn.run(backend))["y"])
    dh = torch.randn_like(call.tensors["h0"])
    values = call.differentiate(backend, {"y": dy, "h": dh})

    starts = range(0, length, piece)

    def part(tensor, start):
        return tensor[:, start : start + piece]

    def check(names, oracle, start):
        assert_close({n: part(values[n], start) for n in names}, {n: oracle[n] for n in names}, dtype)

    def wide(start):
        return call.each(lambda tensor: part(tensor, start)).cast(torch.float64, device)

    exact = dtype if case.rounds else torch.float32
    states = [call.tensors["h0"].double()]
    for start in starts:
        oracle = wide(start).replace(h0=states[-1]).run("torch")
        check(["y"], oracle, start)
        states.append(oracle["h"])
    assert_close({"h": values["h"]}, {"h": states[-1]}, exact)

    adjoint = dh.double()
    moving = [f"d{name}" for name in call.tensors if name in case.sequence]
    lasting = [name for name in call.tensors if name not in (*case.sequence, "h0")]
    sums = {f"d{name}": torch.zeros_like(call.tensors[name], dtype=torch.float64) for name in lasting}
    for i, start in reversed(list(enumerate(starts))):
        cotangents = {"y": part(dy, start).double(), "h": adjoint}
        oracle = wide(start).replace(h0=states[i]).differentiate("torch", cotangents)
        check(moving, oracle, start)
        sums = {name: total + oracle[name] for name, total in sums.items()}
        adjoint = oracle["dh0"]
    assert_close({"dh0": values["dh0"]}, {"dh0": adjoint}, exact)
    assert_close({name: values[name] for name in sums}, sums, dtype)


@pytest.mark.grid(first=True, cuda_only=True, dtypes=(torch.bfloat16,))
def test_outputs_past_int32(case, option, backend, device, dtype, memory):
    """Outputs and gradients of more than 2^31 elements: one row of inputs, seen again and again through stride zero."""
    _needs_memory(70)
    row = case.call(option, {**case.large[0], "b": 1, "l": 1000}).cast(dtype, device)
    cotangents = {"y": draw_cotangents(row.run(backend))["y"]}
    expected = row.differentiate(backend, cotangents)
    count = 2**31 // expected["y"].numel() + 2

    def repeated(tensor):
        return tensor.expand(count, *tensor.shape[1:])

    values = row.each(repeated).differentiate(backend, {"y": repeated(cotangents["y"])})
    assert values["y"].numel() > 2**31
    names = ("y", *(f"d{name}" for name in row.tensors if name in case.sequence))
    assert_close({name: values[name][:1] for name in names}, {name: expected[name] for name in names}, dtype)
    for name in names:
        for part in values[name].split(1024):
            assert (part == values[name][0]).all(), name


@GPU
def test_many_rows(case, option, backend, device):
    """More than the 65535 programs that a grid has along its second and third axis."""
    rows = [{**size, "b": 70_000, "l": 2} for size in case.large]
    size = min((row for row in rows if min(row.values()) > 1), key=lambda row: prod(row.values()))
    call = case.call(option, size, _setting(case, option)).cast(torch.float32, device)
    assert_close(call.differentiate(backend), call.differentiate("torch"), torch.float32)


@GPU
def test_peak_memory(case, option, backend, device, memory):
    """A forward and backward take little more than what they return."""
    _needs_memory(40)
    benchmark = next(row for row in case.benchmarks if row.option.backends is None or backend in row.option.backends)
    call = case.call(benchmark.option, {**benchmark.size, "l": 256}).cast(benchmark.dtype, device)
    call = call.each(lambda tensor: tensor.repeat_interleave(benchmark.size["l"] // 256, 1))
    cotangents = {"y": torch.ones_like(call.tensors["x"])}
    call.each(lambda tensor: tensor[:, :1]).differentiate(backend, {"y": cotangents["y"][:, :1]})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = call.differentiate(backend, cotangents)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(value.untyped_storage().nbytes() for value in values.values())
    assert peak <= case.peak_memory * returned, f"{peak / GiB:.2f} GiB for {returned / GiB:.2f} GiB of results"


@GPU
def test_inductor(case, option, backend, device):
    """One graph without breaks, forward and backward, for two lengths; what surrounds the operation is fused."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(op, tensors, keywords):
        return op(**{**tensors, "x": tensors["x"] * 2}, **keywords, backend=backend)

    def run(call):
        result = compiled(call.case.op, dict(call.tensors), dict(call.keywords))
        return {"y": result} if isinstance(result, torch.Tensor) else dict(zip(("y", "h"), result, strict=True))

    def plain(call):
        return call.replace(x=call.tensors["x"] * 2).run(backend)

    for length in (100, 333):
        size = {**case.large[0], "l": length}
        call = case.call(option, size, _setting(case, option)).cast(torch.float32, device)
        assert_close(differentiate(run, call), differentiate(plain, call), torch.float32)


@GPU
def test_cuda_graph(case, option, backend, device, packed):
    """A captured forward and backward, replayed on other inputs; no launch waits for the host."""
    setting = Setting("graph", h0=case.has(option, "h0"), lengths=(30, 0, 69, 1) if packed else None)
    call = case.call(option, case.large[0], setting).cast(torch.bfloat16, device)
    other = case.call(option, case.large[0], setting, seed=7).cast(torch.bfloat16, device)
    cotangents = draw_cotangents(call.run(backend))
    expected = other.differentiate(backend, cotangents)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = call.differentiate(backend, cotangents)
    for name, tensor in call.tensors.items():
        tensor.copy_(other.tensors[name])
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(values, expected)


@pytest.mark.grid(first=True, cuda_only=True, needs=("step",))
def test_cuda_graph_of_a_step(case, option, backend, device):
    """Each replay advances the same state by one token."""
    call = case.call(option, {**case.large[0], "l": 3}, _setting(case, option)).cast(torch.bfloat16, device)
    whole = call.run(backend)
    tokens = [call.each(lambda tensor, t=t: tensor[:, t]).tensors for t in range(3)]
    given = {name: tensor.clone() for name, tensor in tokens[0].items() if name != "h0"}
    h = call.tensors["h0"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.step(**given, **option.keywords, h=h.clone())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.step(**given, **option.keywords, h=h)
    h.copy_(call.tensors["h0"])
    ys = []
    for token in tokens:
        for name, tensor in given.items():
            tensor.copy_(token[name])
        graph.replay()
        ys.append(y.clone())
    assert_close({"y": torch.stack(ys, 1)}, {"y": whole["y"]}, torch.bfloat16)
    assert_close({"h": h}, {"h": whole["h"]}, torch.bfloat16 if case.rounds else torch.float32)


@GPU
def test_side_stream(case, option, backend, device):
    """Kernels run on the stream that is current, in the order of the caller's own work there."""
    call = case.call(option, case.large[-1]).cast(torch.float32, device)
    expected = call.run(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(call.tensors["x"])
        torch.cuda._sleep(50_000_000)
        x.copy_(call.tensors["x"])
        values = call.replace(x=x).run(backend)
    stream.synchronize()
    assert_same_bits(values, expected)
