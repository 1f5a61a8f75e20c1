"""The decode steps that Numba computes on the CPU, and what is left to PyTorch there."""

import pytest
import torch
from step_table import CAUSAL_CONV1D, OPTIONS, SELECTIVE_SCAN, SSD, each, one_token, some_tokens, wide
from torch.autograd import forward_ad

from ssmscan.ops.causal_conv1d import cpu_step as causal_conv1d_cpu
from ssmscan.ops.selective_scan import cpu_step as selective_scan_cpu
from ssmscan.ops.ssd import cpu_step as ssd_cpu
from ssmscan.testing import assert_close, same_bits

numba = pytest.importorskip("numba")
CASES = (CAUSAL_CONV1D, SELECTIVE_SCAN, SSD)
COMPILED = pytest.mark.parametrize(
    ("case", "option"),
    [(case, option) for case, option in OPTIONS if case in CASES],
    ids=lambda value: value.name.replace(" ", "_"),
)
FIRST = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def calls(monkeypatch):
    """How often a token is computed by Numba."""
    count = []
    for module in (causal_conv1d_cpu, selective_scan_cpu, ssd_cpu):

        def run(*arguments, run=module.run):
            count.append(1)
            return run(*arguments)

        monkeypatch.setattr(module, "run", run)
    return count


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@COMPILED
def test_numbers(case, option, dtype, calls):
    """Against the same step in float64, which PyTorch computes."""
    for size in ({}, case.sizes[-1]):
        given, h = one_token(case, option, size, torch.float32, "cpu")
        given = {name: tensor.to(dtype) for name, tensor in given.items()}
        exact, state = {name: wide(tensor) for name, tensor in given.items()}, wide(h)
        expected = case.step(**exact, **option.keywords, h=state)
        assert not calls
        y = case.step(**given, **option.keywords, h=h)
        assert len(calls) == 1
        calls.clear()
        assert y.dtype is dtype
        assert_close({"h": h}, {"h": state}, h.dtype)
        assert_close({"y": y}, {"y": expected}, dtype)


@torch.no_grad()
@FIRST
def test_in_place(case, calls):
    """A state with strides, and one in a narrow dtype, are overwritten where they lie."""
    option = case.options[0]
    given, h = one_token(case, option, {"b": 2}, torch.float32, "cpu")
    dense, strided = h.clone(), h.transpose(0, -1).contiguous().transpose(0, -1)
    narrow = h.bfloat16()
    expected = case.step(**given, **option.keywords, h=dense)
    address = strided.data_ptr()
    assert same_bits(case.step(**given, **option.keywords, h=strided), expected)
    assert same_bits(strided, dense)
    assert strided.data_ptr() == address
    case.step(**given, **option.keywords, h=narrow)
    assert_close({"h": narrow}, {"h": dense}, torch.bfloat16)
    assert len(calls) == 3


@FIRST
def test_threads(case):
    """As many threads as there may be compute the same bits."""
    option = case.options[0]
    given, h = some_tokens(case, option, {"b": 3, "l": 2}, torch.float32, "cpu")
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            state = h.clone()
            found.append((case.step(**given, **option.keywords, h=state), state))
    torch.set_num_threads(before)
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
@FIRST
def test_left_to_pytorch(case, calls):
    """Derivatives of both modes, float64, transforms and compilers see PyTorch's operations."""
    option = case.options[0]
    given, h = one_token(case, option, {"b": 2}, torch.float32, "cpu")

    def step(x, h):
        h = h.clone()
        return case.step(**{**given, "x": x}, **option.keywords, h=h), h

    y, after = step(given["x"], h)
    assert len(calls) == 1
    with torch.enable_grad():
        assert step(given["x"].clone().requires_grad_(), h)[0].requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given["x"], torch.ones_like(given["x"]))
        assert forward_ad.unpack_dual(step(dual, h)[0]).tangent is not None
    compiled = torch.compile(step, backend="eager", fullgraph=True)(given["x"], h)
    traced = torch.func.functionalize(step)(given["x"], h)
    for other_y, other_h in (compiled, traced):
        assert_close({"y": other_y, "h": other_h}, {"y": y, "h": after}, torch.float32)
    assert len(calls) == 1
    one = each(case, given, lambda tensor: tensor[:0])
    assert case.step(**one, **option.keywords, h=h[:0]).shape == one["x"].shape
