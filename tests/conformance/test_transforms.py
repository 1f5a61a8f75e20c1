"""Under the transforms of PyTorch: registered operators, torch.compile, autocast, activation checkpointing."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from recorder import Recorder
from ssmscan.testing import (
    PLAIN,
    Setting,
    assert_close,
    assert_same_bits,
    differentiate,
    draw_cotangents,
    widest,
)

H0 = Setting("h0", h0=True)
PACKED = Setting("packed reverse", h0=True, reverse=True, lengths=(0, 1, 17))


@pytest.mark.grid(first=True, backends=("cpu", "triton"), settings=(PLAIN, PACKED))
def test_registered_operators(case, option, backend, device, setting, size):
    """Schema, autograd registration, fake tensors and dynamic shapes of each operator that a call goes through.

    In bfloat16, where states have another dtype than x.
    """
    _check_operators(case.call(option, size, setting).cast(torch.bfloat16, device), backend)


@pytest.mark.grid(first=True, needs=("dtype",), backends=("cpu", "triton"))
def test_registered_operators_with_a_dtype_of_the_output(case, option, backend, device, size):
    _check_operators(case.call(option, size).cast(torch.float32, device).set(dtype=torch.bfloat16), backend)


def _check_operators(call, backend):
    recorder = Recorder()
    with recorder:
        call.differentiate(backend)
    assert recorder.calls, "no registered operator was called"
    for function, arguments, keywords in recorder.calls:

        def fresh(value, forward=function is recorder.calls[0][0]):
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach().clone().requires_grad_(forward and value.is_floating_point())

        torch.library.opcheck(function, tuple(fresh(v) for v in arguments), {n: fresh(v) for n, v in keywords.items()})


def _compiled(backend):
    """``Call.run`` compiled, and the list of compilations so far."""
    compilations = []

    def compiler(graph, inputs):
        result = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        # Only now, for a trace that meets a float argument starts again from here.
        compilations.append(graph)
        return result

    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=compiler)
    def compiled(op, tensors, keywords):
        return op(**tensors, **keywords, backend=backend)

    def run(call):
        result = compiled(call.case.op, dict(call.tensors), dict(call.keywords))
        return {"y": result} if isinstance(result, torch.Tensor) else dict(zip(("y", "h"), result, strict=True))

    return run, compilations


def _check_compiled(case, option, backend, device, setting, size, lengths):
    """One graph without breaks serves two lengths, forward and backward."""
    run, compilations = _compiled(backend)
    for length in lengths:
        if setting.lengths is not None:
            setting = replace(setting, lengths=(0, 1, length))
        call = case.call(option, {**size, "l": length}, setting).cast(widest(backend), device)
        assert call.tensors["x"].shape[1] not in size.values(), "axes as long as each other are compiled as one"
        assert_close(differentiate(run, call), call.differentiate(backend), widest(backend))
    assert len(compilations) == 1


@pytest.mark.grid(backends=("cpu", "triton"), settings=(PLAIN, PACKED), costly=True)
def test_compile(case, option, backend, device, setting, size):
    _check_compiled(case, option, backend, device, setting, size, (21, 26))


# The torch backend is unrolled into thousands of operators, which takes half a minute to trace.
@pytest.mark.slow
@pytest.mark.grid(backends=("torch",), settings=(PLAIN, H0, PACKED))
def test_compile_plain(case, option, backend, setting, size):
    _check_compiled(case, option, backend, "cpu", setting, size, (37, 45))


@pytest.mark.grid(first=True, needs=("cu_seqlens",), backends=("cpu", "triton"))
def test_bad_bounds_that_no_one_reads(case, option, backend, device, size):
    """Compiled, or on a GPU, the values of cu_seqlens are not read on the host; bad ones turn all outputs into NaN."""
    run, _ = _compiled(backend)
    call = case.call(option, size, Setting("packed", lengths=(3, 20, 4))).cast(torch.float32, device)
    for bad in ([0, 20, 3, 27], [1, 3, 20, 27], [0, 3, 20, 26], [0, 3, 20, 99], [-5, 3, 20, 27]):
        outputs = run(call.set(cu_seqlens=torch.tensor(bad, device=device)))
        assert outputs["y"].isnan().all(), bad
        assert all(output.isnan().all() for output in outputs.values()), bad
    assert run(call)["y"].isfinite().all()


@pytest.mark.grid(first=True, dtypes=(torch.bfloat16,))
def test_autocast(case, option, backend, device, dtype, size):
    """The surrounding autocast changes nothing: each argument is taken in the dtype in which it comes."""
    wide = case.call(option, size, Setting("h0", h0=case.has(option, "h0"))).cast(torch.float32, device)
    call = wide.replace(x=wide.tensors["x"].to(dtype))
    expected = call.differentiate(backend)

    def under_autocast(call):
        with torch.autocast(device, dtype=dtype):
            return call.run(backend)

    assert_same_bits(differentiate(under_autocast, call), expected)


@pytest.mark.grid(first=True)
def test_activation_checkpointing(case, option, backend, device, size):
    call = case.call(option, size, Setting("h0", h0=case.has(option, "h0"))).cast(widest(backend), device)

    def checkpointed(call):
        return checkpoint(call.run, backend, use_reentrant=False)

    assert_same_bits(differentiate(checkpointed, call), call.differentiate(backend))


@pytest.mark.grid(first=True, needs=("step",))
def test_compiled_step(case, option, size):
    """The state is still updated in place."""
    call = case.call(option, size).cast(torch.float32).each(lambda tensor: tensor[:, 0])
    h, expected = case.draw_state(size, size["b"]).float(), case.draw_state(size, size["b"]).float()
    compiled = torch.compile(case.step, fullgraph=True, dynamic=True, backend="aot_eager")
    y = compiled(**call.tensors, **call.keywords, h=h)
    assert torch.equal(y, case.step(**call.tensors, **call.keywords, h=expected))
    assert torch.equal(h, expected)
    assert not torch.equal(h, case.draw_state(size, size["b"]).float())


@pytest.mark.grid(first=True)
def test_inference_mode(case, option, backend, device, size):
    call = case.call(option, size).cast(torch.float32, device)
    with torch.inference_mode():
        outputs = call.run(backend)
    assert_same_bits(outputs, call.run(backend))


@pytest.mark.grid(first=True)
def test_offloading(case, option, backend, device, size):
    """What the backward needs goes through PyTorch's hooks of saved tensors."""
    call = case.call(option, size).cast(widest(backend), device)
    cotangents = draw_cotangents(call.run(backend))
    saved = []

    def offload(tensor):
        saved.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(offload, lambda tensor: tensor):
        values = call.differentiate(backend, cotangents)
    assert saved
    assert_same_bits(values, call.differentiate(backend, cotangents))


@pytest.mark.grid(first=True, backends=("cpu", "triton"))
def test_transforms_of_functions_are_refused(case, option, backend, device):
    """Tangents and batches that the kernels do not see would be lost without a word."""
    # A Jacobian has as many rows as x has numbers.
    call = case.call(option, case.sizes[0]).cast(torch.float32, device)
    x = call.tensors["x"]

    def y(x):
        return call.replace(x=x).run(backend)["y"]

    ones = torch.ones_like(x)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"{case.name}: a forward-mode derivative needs"):
            y(torch.autograd.forward_ad.make_dual(x, ones))
        # Of other tensors the level changes nothing.
        assert torch.equal(y(x), call.run(backend)["y"])
    for transform in (
        lambda: torch.autograd.functional.jacobian(y, x, strategy="forward-mode", vectorize=True),
        lambda: torch.func.jvp(y, (x,), (ones,)),
        lambda: torch.func.grad(lambda x: y(x).sum())(x),
        lambda: torch.func.vmap(y)(torch.stack([x, x])),
    ):
        with pytest.raises(NotImplementedError, match=f'{case.name}: a .* needs backend="torch", got backend='):
            transform()


@pytest.mark.grid(first=True, backends=("cpu", "triton"))
def test_eager_mode_spares_the_dispatcher(case, option, backend, device, size):
    """Gradients are the same bits whether a mode watches, so that operators run, or not."""
    call = case.call(option, size, PLAIN).cast(torch.float32, device)
    recorder = Recorder()
    with recorder:
        watched = call.differentiate(backend)
    assert {function.overloadpacket._qualified_op_name.split("::")[1] for function, *_ in recorder.calls} >= {
        f"{case.name}_backward"
    }
    assert_same_bits(call.differentiate(backend), watched)


@pytest.mark.grid(first=True, cuda_only=True, settings=(PLAIN, H0))
def test_calls_from_a_record(case, option, backend, device, dtype, setting, monkeypatch):
    """From the third call of the same shapes on: other values at other addresses, among memory full of NaN."""
    from ssmscan.ops._triton.record import Recorded

    calls = [case.call(option, size, setting).cast(dtype, device) for size in case.large[:2] for _ in range(4)]
    calls = [call.replace(x=call.tensors["x"] * (1 + i)) for i, call in enumerate(calls)]
    repeated = []
    for call in calls:
        filler = [torch.full((1 << 16,), torch.nan, device=device) for _ in range(16)]
        del filler
        repeated.append(call.differentiate(backend))
    monkeypatch.setattr(Recorded, "__call__", lambda self, *arguments: self.function(*arguments))
    for call, values in zip(calls, repeated, strict=True):
        assert_same_bits(values, call.differentiate(backend))
