"""What is around a call and is none of its arguments: the default device and dtype, fake tensors, tracers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ssmscan.testing import PLAIN, Setting, assert_same_bits, differentiate, draw_cotangents

EVERY = ("reference", "torch", "cpu", "triton")
PACKED = Setting("packed", lengths=(0, 3, 17))


@pytest.fixture
def default():
    """Sets PyTorch's default device and dtype, for a while."""

    def change(device, dtype):
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("other", [("meta", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float64)], ids=str)
@pytest.mark.grid(first=True, backends=EVERY, settings=(PLAIN, PACKED))
def test_default_device_and_dtype(case, option, backend, setting, size, default, other):
    """All that an operation makes for itself has the device and dtype of its arguments."""
    call = case.call(option, size, setting).cast(torch.float32)
    cotangents = draw_cotangents(call.run(backend))
    expected = call.differentiate(backend, cotangents)
    default(*other)
    assert_same_bits(call.differentiate(backend, cotangents), expected)


@pytest.mark.grid(first=True, backends=("cpu", "triton"), settings=(PLAIN, PACKED))
def test_fake_tensors(case, option, backend, setting, size):
    """They have shapes and no values; the bounds of packed sequences are none to read."""
    call = case.call(option, size, setting).cast(torch.float32)
    expected = call.differentiate(backend)
    with FakeTensorMode() as mode:
        fake = call.replace(**{name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()})
        if "cu_seqlens" in call.keywords:
            fake = fake.set(cu_seqlens=mode.from_tensor(call.keywords["cu_seqlens"]))
        cotangents = {name: torch.empty_like(output) for name, output in fake.run(backend).items()}
        values = fake.differentiate(backend, cotangents)
    assert {n: (v.shape, v.dtype) for n, v in values.items()} == {n: (v.shape, v.dtype) for n, v in expected.items()}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
# Of the checks, which hold for any call.
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.grid(first=True, backends=("cpu",))
def test_jit_trace(case, option, backend, size):
    """As TensorBoard does for the graph of a model; the operator stands in it, for any length and with gradients."""
    setting = Setting("h0", h0=case.has(option, "h0"))
    call = case.call(option, size, setting).cast(torch.float32)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in call.tensors.values())

    def on_cpu(*tensors):
        return case.op(**dict(zip(call.tensors, tensors, strict=True)), **call.keywords, backend="cpu")

    traced = torch.jit.trace(on_cpu, leaves)

    def run(call):
        results = traced(*call.tensors.values())
        return {"y": results} if isinstance(results, torch.Tensor) else dict(zip(("y", "h"), results, strict=True))

    longer = case.call(option, {**size, "l": size["l"] + 7}, setting, seed=5).cast(torch.float32)
    assert_same_bits(differentiate(run, longer), longer.differentiate("cpu"))


@pytest.mark.grid(first=True, backends=("cpu",), settings=(PLAIN, PACKED))
def test_make_fx(case, option, backend, setting, size):
    """The operator stands in the graph; the bounds of packed sequences are an input like any other."""
    call = case.call(option, size, setting).cast(torch.float32)
    tensors = dict(call.tensors) | {n: v for n, v in call.keywords.items() if isinstance(v, torch.Tensor)}
    keywords = {name: value for name, value in call.keywords.items() if name not in tensors}
    graph = make_fx(lambda tensors: case.op(**tensors, **keywords, backend="cpu"))(tensors)
    assert f"torch.ops.ssmscan.{case.name}.default" in graph.code
    results = graph(tensors)
    values = {"y": results} if isinstance(results, torch.Tensor) else dict(zip(("y", "h"), results, strict=True))
    assert_same_bits(values, call.run("cpu"))
