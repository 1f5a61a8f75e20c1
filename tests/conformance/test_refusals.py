"""What an operation refuses: the type of the error, its text, and arguments that stay as they were."""

import inspect
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ssmscan import backend as available
from ssmscan.testing import Setting, assert_same_bits

FIRST = pytest.mark.grid(first=True, backends=("reference",))
PACKED = pytest.mark.grid(first=True, backends=("reference",), needs=("cu_seqlens",))
LENGTHS = (3, 0, 5)


def _refuses(function, call, error, *parts, **changes):
    """``function`` with ``changes`` raises ``error``; its text, returned, names it and ``parts`` and is a sentence."""
    arguments = {**call.tensors, **call.keywords, **changes}
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.device.type != "meta"}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(f"{function.__name__}: ")
    assert re.search(r", got .+\.$", text), text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
    assert_same_bits(tensors, before)
    return text


def _good(case, option, size, **wanted):
    setting = Setting("good", h0=case.has(option, "h0"), **wanted)
    return case.call(option, size, setting).cast(torch.float32)


def _packed(case, option, size):
    return _good(case, option, size, lengths=LENGTHS)


@FIRST
def test_a_good_call_is_accepted(case, option, size):
    """All that follows changes one thing in it."""
    case.op(**_good(case, option, size).tensors, **option.keywords)
    if case.has(option, "cu_seqlens"):
        call = _packed(case, option, size)
        case.op(**call.tensors, **call.keywords)


@pytest.mark.grid(backends=("reference",))
def test_dtype(case, option, size):
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        for dtype in (torch.int64, torch.bool, torch.complex64):
            if dtype is torch.complex64 and tensor.is_complex():
                continue
            real = tensor.real if tensor.is_complex() else tensor
            _refuses(case.op, call, TypeError, f"{name} must be", str(dtype), **{name: real.to(dtype)})


@pytest.mark.grid(backends=("reference",))
def test_no_tensor(case, option, size):
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        for value in (tensor.numpy(), tensor.tolist(), 1.0):
            _refuses(case.op, call, TypeError, f"{name} must be a torch.Tensor", type(value).__name__, **{name: value})


@FIRST
def test_none(case, option, size):
    """For an argument without which there is no call; what may be left out may be None."""
    call = _good(case, option, size)
    defaults = {name: p.default for name, p in inspect.signature(case.op).parameters.items()}
    for name in call.tensors:
        if defaults[name] is not None:
            _refuses(case.op, call, TypeError, f"{name} must be a torch.Tensor", "NoneType", **{name: None})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.grid(backends=("reference",))
def test_tensors_that_are_not_dense(case, option, size, mesh):
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        nested = torch.nested.as_nested_tensor([tensor, tensor], layout=torch.strided)
        shard = DTensor.from_local(tensor, mesh, run_check=False)
        for value, got in (
            (tensor.to_sparse(), "torch.sparse_coo. Use"),
            (nested, "a nested tensor. Concatenate"),
            (torch.nested.as_nested_tensor([tensor, tensor], layout=torch.jagged), "a nested tensor. Concatenate"),
            (shard, f"DTensor. Use {name}.to_local()"),
            (torch.nn.Parameter(shard), f"DTensor. Use {name}.to_local()"),
        ):
            with pytest.raises(TypeError) as caught:
                case.op(**{**call.tensors, **call.keywords, name: value})
            assert str(caught.value).startswith(f"{case.name}: {name} must be a dense tensor, got {got}")


@pytest.fixture(scope="module")
def mesh():
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@FIRST
def test_flags(case, option, size):
    """No value that only counts as true or false: "no" would be true."""
    call = _good(case, option, size)
    token = call.each(lambda tensor: tensor[:, 0])
    for function, good in ((case.op, call), (case.step, token)):
        parameters = {} if function is None else inspect.signature(function).parameters
        for name in (name for name, parameter in parameters.items() if isinstance(parameter.default, bool)):
            for value in ("no", 1, None, torch.tensor(True)):
                arguments = {n: v for n, v in {**good.tensors, **good.keywords, name: value}.items() if n in parameters}
                if "h" in parameters:
                    arguments["h"] = good.tensors["h0"]
                rule = f"{function.__name__}: {name} must be True or False, got {value!r}."
                with pytest.raises(TypeError, match=f"^{re.escape(rule)}$"):
                    function(**arguments)


@pytest.mark.grid(backends=("reference",))
def test_device(case, option, size):
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        _refuses(case.op, call, ValueError, "must be on the device of", "meta", "cpu", **{name: tensor.to("meta")})


@pytest.mark.grid(backends=("reference",))
def test_rank(case, option, size):
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        if name != "x" or not case.leading:
            _refuses(case.op, call, ValueError, " must ", **{name: tensor[None]})
        # An argument that holds for all time may come with fewer axes, as one D for a head or for all of its channels.
        if name in (*case.sequence, "h0"):
            _refuses(case.op, call, ValueError, " must ", **{name: tensor[..., 0]})


@pytest.mark.grid(backends=("reference",))
def test_shape(case, option, size):
    """No axis is broadcast, and none is cut to fit."""
    call = _good(case, option, size)
    for name, tensor in call.tensors.items():
        # The further axes of an argument that holds for all time may have other lengths, as the width of a kernel.
        axes = range(tensor.dim()) if name in case.sequence or name == "h0" else range(1)
        for axis in axes if name != "x" else ():
            for wrong in (tensor.narrow(axis, 0, 1), torch.cat([tensor, tensor], axis)):
                _refuses(case.op, call, ValueError, " must ", **{name: wrong})


@pytest.mark.grid(first=True, backends=("reference",), needs=("h0",))
def test_initial_state(case, option, size):
    call = _good(case, option, size)
    h0 = call.tensors["h0"]
    text = _refuses(case.op, call, ValueError, "h0 must have shape (b, ", str(tuple(h0[1:].shape)), h0=h0[1:])
    assert "cu_seqlens" not in text
    if case.has(option, "cu_seqlens"):
        packed = _packed(case, option, size)
        parts = ("h0 must have shape (s, ", "and cu_seqlens", str((1, *h0.shape[1:])))
        _refuses(case.op, packed, ValueError, *parts, h0=h0[:1])


@PACKED
@pytest.mark.parametrize(
    ("bounds", "parts"),
    [
        ([1, 3, 8], ("start at 0", "1 … 8")),
        ([0, 3, 7], ("end at the length 8", "0 … 7")),
        ([0, 3, 9], ("end at the length 8", "0 … 9")),
        ([0, 5, 3, 8], ("not decrease", "5 then 3")),
        ([0, -1, 8], ("not decrease", "0 then -1")),
        ([0, 9, 8], ("not decrease", "9 then 8")),
    ],
    ids=str,
)
def test_bounds(case, option, size, bounds, parts):
    call = _packed(case, option, size)
    _refuses(case.op, call, ValueError, "cu_seqlens must", *parts, cu_seqlens=torch.tensor(bounds))


@PACKED
def test_bounds_of_another_kind(case, option, size):
    call = _packed(case, option, size)
    bounds = call.keywords["cu_seqlens"]
    _refuses(case.op, call, TypeError, "cu_seqlens must be a torch.Tensor", "list", cu_seqlens=bounds.tolist())
    _refuses(case.op, call, TypeError, "cu_seqlens must be a torch.Tensor", "ndarray", cu_seqlens=bounds.numpy())
    for dtype in (torch.float32, torch.int16, torch.bool):
        _refuses(case.op, call, TypeError, "int32 or int64", str(dtype), cu_seqlens=bounds.to(dtype))
    sparse = call.set(cu_seqlens=bounds.to_sparse())
    with pytest.raises(TypeError, match=r"cu_seqlens must be a dense tensor, got torch.sparse_coo."):
        sparse.run("reference")
    _refuses(case.op, call, ValueError, "(s+1,)", "(1, 4)", cu_seqlens=bounds[None])
    _refuses(case.op, call, ValueError, "(s+1,)", "()", cu_seqlens=bounds[0])
    _refuses(case.op, call, ValueError, "(s+1,)", "(0,)", cu_seqlens=bounds[:0])
    _refuses(case.op, call, ValueError, "on the device of x", "meta", cu_seqlens=bounds.to("meta"))


@PACKED
def test_packed_batch(case, option, size):
    call = _packed(case, option, size).each(lambda tensor: torch.cat([tensor, tensor]))
    _refuses(case.op, call, ValueError, "batch 1 with cu_seqlens", "got 2")


@FIRST
def test_unknown_backend(case, option, size):
    call = _good(case, option, size)
    for name in ("cuda", "Triton", "", None):
        _refuses(
            case.op, call, ValueError, "backend must be one of auto, ", *available.BACKENDS, repr(name), backend=name
        )


@FIRST
def test_backend_that_is_not_installed(case, option, size, monkeypatch):
    """Named, it is an error, never another one in its place; "auto" takes what is there."""
    monkeypatch.setattr(available, "TRITON", False)
    monkeypatch.setattr(available, "NUMBA", False)
    call = _good(case, option, size)
    for name, package in (("triton", "triton"), ("cpu", "numba")):
        if name in case.backends:
            parts = (f'backend="{name}" needs the package {package}', "none installed")
            _refuses_backend(case, call, name, *parts)
    assert_same_bits(call.run("auto"), call.run("torch"))


@FIRST
def test_backend_on_another_device(case, option, size, monkeypatch):
    monkeypatch.setattr(available, "INTERPRET", False)
    monkeypatch.setattr(available, "TRITON", True)
    monkeypatch.setattr(available, "NUMBA", True)
    call = _good(case, option, size)
    _refuses_backend(case, call, "triton", "needs a CUDA tensor", "got cpu")
    if "cpu" in case.backends:
        meta = call.each(lambda tensor: tensor.to("meta"), tuple(call.tensors))
        _refuses_backend(case, meta, "cpu", "needs a CPU tensor", "got meta")


@FIRST
def test_float64_on_triton(case, option, size, monkeypatch):
    monkeypatch.setattr(available, "INTERPRET", True)
    monkeypatch.setattr(available, "TRITON", True)
    call = _good(case, option, size).cast(torch.float64)
    _refuses_backend(case, call, "triton", "needs float32, bfloat16 or float16", "got torch.float64")


def _refuses_backend(case, call, name, *parts):
    with pytest.raises(RuntimeError) as caught:
        call.run(name)
    assert type(caught.value) is RuntimeError
    text = str(caught.value)
    assert text.startswith(f'{case.name}: backend="{name}" needs ')
    assert text.endswith('. Use backend="auto".')
    assert all(part in text for part in parts), text


def test_own_refusals(refusal):
    case, rule = refusal
    call = _good(case, case.options[0], case.sizes[0])
    arguments = {**call.tensors, **call.keywords}
    rule.change(arguments)
    with pytest.raises(rule.error, match=rf"^{case.name}: .*{re.escape(rule.argument)}.*, got .+\.$") as caught:
        case.op(**arguments)
    assert type(caught.value) is rule.error


@pytest.mark.grid(first=True, needs=("step",), backends=("reference",))
def test_step(case, option, size):
    """The state of a step is overwritten, so it must have the very shape."""
    call = _good(case, option, size).each(lambda tensor: tensor[:, 0])
    call = call.replace(h=call.tensors["h0"])
    tensors = {name: tensor for name, tensor in call.tensors.items() if name != "h0"}
    h = tensors["h"]

    def refuses(error, *parts, **changes):
        arguments = {**tensors, **option.keywords, **changes}
        before = h.clone()
        with pytest.raises(error) as caught:
            case.step(**arguments)
        text = str(caught.value)
        assert text.startswith(f"{case.step.__name__}: ")
        assert all(part in text for part in parts), text
        assert torch.equal(h, before)

    refuses(ValueError, "h must have shape", h=h[1:])
    refuses(ValueError, "h must have shape", h=h[:1])
    refuses(TypeError, "h must be", h=h.long())
    refuses(ValueError, "must be on the device of", h=h.to("meta"))
    refuses(ValueError, "must have shape", x=tensors["x"][None])
    refuses(TypeError, "x must be", x=tensors["x"].long())
