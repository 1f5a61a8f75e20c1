"""Many threads, forked and fresh processes, and addresses past 2^31 elements, where a fault would end the process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

from ssmscan.ops.cases import CASES
from ssmscan.testing import Setting, assert_close, assert_same_bits, draw_cotangents

SETTING = Setting("h0", h0=True)


def _values(name, backend, device, seed=0):
    """Outputs and gradients, computed from the case's name: what another process can be asked for."""
    case = next(case for case in CASES if case.name == name)
    option = case.options[0]
    setting = SETTING if case.has(option, "h0") else Setting("plain")
    sizes = case.sizes if device == "cpu" else case.large
    values = case.call(option, sizes[0], setting, seed).cast(torch.float32, device).differentiate(backend)
    return {name: value.cpu() for name, value in values.items()}


def _spawned():
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def fresh_process():
    """One for all operations: starting it takes longer than what they do."""
    with _spawned() as pool:
        yield pool


@pytest.mark.grid(first=True, backends=("cpu", "triton"))
def test_fresh_process(case, backend, device, fresh_process):
    values = fresh_process.submit(_values, case.name, backend, device).result(timeout=300)
    assert_same_bits(values, _values(case.name, backend, device))


# Triton's interpreter patches its language module while a kernel runs: one thread at a time.
@pytest.mark.grid(first=True, backends=("torch", "cpu"))
def test_threads(case, backend):
    """Calls from several Python threads at once, beside work on PyTorch's own threads."""
    seeds = range(8)
    expected = [_values(case.name, backend, "cpu", seed) for seed in seeds]
    matrix = torch.ones(400, 400)
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(torch.matmul, matrix, matrix) for _ in range(20)]
        for _ in range(3):
            for values, wanted in zip(
                pool.map(lambda seed: _values(case.name, backend, "cpu", seed), seeds), expected, strict=True
            ):
                assert_same_bits(values, wanted)
        assert all(torch.equal(future.result(), 400 * matrix) for future in noise)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
# Python warns of what is tested here: a fork while other threads exist.
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.grid(first=True, backends=("torch", "cpu"))
def test_fork(case, backend):
    """As a data loader's worker does: the parent has run on its threads, which the child does not have."""
    expected = _values(case.name, backend, "cpu")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work():
        # As PyTorch's data loader does: its own threads do not survive a fork.
        torch.set_num_threads(1)
        queue.put({name: value.numpy() for name, value in _values(case.name, backend, "cpu").items()})

    child = context.Process(target=work)
    child.start()
    values = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert_same_bits({name: torch.from_numpy(value) for name, value in values.items()}, expected)
    assert_same_bits(_values(case.name, backend, "cpu"), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.grid(first=True, backends=("cpu",))
def test_number_of_threads(case, backend, threads):
    expected = _values(case.name, backend, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(_values(case.name, backend, "cpu"), expected)
    finally:
        torch.set_num_threads(before)


def _far_apart(name, backend, device, axis, stride, length):
    """Run a call whose tensors span more than 2^31 elements along ``axis``, in memory that is hardly touched."""
    case = next(case for case in CASES if case.name == name)
    option = case.options[0]
    size = {**case.sizes[0], "b": 1} | {"bl"[axis]: length}
    call = case.call(option, size).cast(torch.float32, device)
    cotangents = draw_cotangents(call.run("torch"))
    buffer = torch.empty((length - 1) * stride + 2**16, device=device)
    assert buffer.numel() > 2**31
    used = 0

    def spread(tensor):
        nonlocal used
        strides = list(tensor[:1, :1].contiguous().stride())
        strides[1 - axis] = tensor[0, 0].numel()
        strides[axis] = stride
        view = buffer.as_strided(tensor.shape, strides, used)
        used += tensor[0].numel() if axis == 0 else tensor[:, 0].numel()
        assert used <= 2**16
        return view.copy_(tensor)

    spread_out = call.each(spread)
    values = spread_out.differentiate(backend, cotangents | {"y": spread(cotangents["y"])})
    assert_close(values, call.differentiate(backend, cotangents), torch.float32)


def _far_apart_both_ways(name, backend, device):
    _far_apart(name, backend, device, 0, 2**30 + 2**16, 3)
    # A token's neighbours in a kernel's tile are a row of a tensor (l, b, d) apart, here one of 2^26.
    _far_apart(name, backend, device, 1, 2**26, 37)


@pytest.mark.grid(first=True, backends=("triton",), spare=True)
def test_more_than_int32_elements(case, backend, device, memory):
    """On a device; ``test_far_apart.py`` does it on the CPU."""
    with _spawned() as pool:
        pool.submit(_far_apart_both_ways, case.name, backend, device).result(timeout=300)
