"""A given by its logarithm, as layers keep it: in the operations -exp(A) before all else, in a step in its kernel."""

import pytest
import torch
from step_table import one_token, wide
from torch.utils._python_dispatch import TorchDispatchMode

from ssmscan import backend as available
from ssmscan.ops.selective_scan.case import CASE as SELECTIVE_SCAN
from ssmscan.ops.selective_scan.case import LOGARITHM as SELECTIVE_SCAN_LOGARITHM
from ssmscan.ops.ssd.bidirectional.case import CASE as SSD_BIDIRECTIONAL
from ssmscan.ops.ssd.case import CASE as SSD
from ssmscan.ops.ssd.case import LOGARITHM as SSD_LOGARITHM
from ssmscan.shapes import state_dtype
from ssmscan.testing import Setting, assert_close, assert_same_bits, differentiate

STEPS = [(SELECTIVE_SCAN, SELECTIVE_SCAN_LOGARITHM), (SSD, SSD_LOGARITHM)]
ALL = pytest.mark.parametrize(
    ("case", "option"), [*STEPS, (SSD_BIDIRECTIONAL, SSD_LOGARITHM)], ids=lambda value: value.name.replace(" ", "_")
)
WITH_STEP = pytest.mark.parametrize(("case", "option"), STEPS, ids=lambda value: value.name.replace(" ", "_"))


def _spelled(call, backend="auto"):
    """The call with -exp(A), in the dtype of its sums, in A's place."""
    A = -call.tensors["A"].to(state_dtype(*call.tensors.values())).exp()
    return call.replace(A=A).set(A_is_log=None).run(backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@ALL
def test_operation(case, option, backend, dtype):
    """Outputs and gradients, that to the logarithm among them, which may be narrow itself."""
    if available.why_not(backend, "cpu", dtype) is not None:
        pytest.skip("numba is not installed")
    call = case.call(option, case.sizes[0], Setting("h0", h0=case.has(option, "h0"))).cast(dtype)
    call = call.replace(A=call.tensors["A"].to(dtype))
    values = call.differentiate(backend)
    assert values["dA"].dtype is dtype
    assert values["dA"].any()
    assert_same_bits(values, differentiate(lambda call: _spelled(call, backend), call))


@WITH_STEP
def test_steps_are_the_operation(case, option):
    """In float64, with the gradient to the logarithm."""
    call = case.call(option, case.sizes[0], Setting("h0", h0=True))

    def steps(call):
        h = call.tensors["h0"].clone()
        tensors = {name: tensor for name, tensor in call.tensors.items() if name != "h0"}
        return {"y": case.step(**tensors, **call.keywords, h=h), "h": h}

    assert_close(differentiate(steps, call), call.differentiate("reference"), torch.float64)


class _Called(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
@WITH_STEP
def test_nothing_but_the_kernel(case, option, device, launches):
    """A step's exponential is no launch of its own, and the operator that a compiler sees has it within."""
    given, h = one_token(case, option, {}, torch.float32, device)
    expected_h = wide(h)
    expected = case.step(**{name: wide(tensor) for name, tensor in given.items()}, **option.keywords, h=expected_h)
    assert not launches
    with _Called() as called:
        y = case.step(**given, **option.keywords, h=h)
    assert len(launches) == 1
    names = [name for name in called.names if name.startswith("ssmscan::") or name in ("aten::exp", "aten::neg")]
    assert names == [f"ssmscan::{case.name}_step"]
    assert_close({"y": y, "h": h}, {"y": expected, "h": expected_h}, torch.float32)


@torch.no_grad()
@WITH_STEP
def test_compiled(case, option, device):
    """In one graph."""
    given, h = one_token(case, option, {}, torch.float32, device)
    other = h.clone()
    y = torch.compile(case.step, backend="eager", fullgraph=True)(**given, **option.keywords, h=h)
    assert torch.equal(y, case.step(**given, **option.keywords, h=other))
    assert torch.equal(h, other)
