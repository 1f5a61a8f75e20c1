"""Derivatives by finite differences, undefined and second ones, and those of some inputs only."""

import pytest
import torch

from ssmscan.testing import PLAIN, Setting, assert_close, assert_same_bits, draw_cotangents, widest

# Longer than the 16 steps between two saved states.
SETTINGS = (PLAIN, Setting("h0", h0=True), Setting("packed reverse", h0=True, reverse=True, lengths=(0, 1, 17)))


def _function(call, backend):
    """``call`` as a function of its tensors, and the tensors."""

    def function(*tensors):
        return tuple(call.replace(**dict(zip(call.tensors, tensors, strict=True))).run(backend).values())

    return function, tuple(tensor.detach().requires_grad_() for tensor in call.tensors.values())


@pytest.mark.grid(backends=("torch", "cpu"), settings=SETTINGS)
def test_finite_differences(case, option, backend, setting, size):
    """Of all outputs jointly, of each alone, and with undefined incoming gradients."""
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(*_function(case.call(option, size, setting), backend), fast_mode=True)


@pytest.mark.grid(backends=("torch",), settings=SETTINGS, spare=True)
def test_second_finite_differences(case, option, backend, setting, size):
    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(*_function(case.call(option, size, setting), backend), fast_mode=True)


@pytest.mark.grid(first=True, backends=("cpu", "triton"))
def test_second_derivative_is_refused(case, option, backend, device, size):
    call = case.call(option, size).cast(torch.float32, device)
    x = call.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(call.run(backend)["y"].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f'{case.name}: a second derivative needs backend="torch", got'):
        dx.sum().backward()


@pytest.mark.grid(settings=SETTINGS[1:])
def test_one_gradient_at_a_time(case, option, backend, device, setting, size):
    """Each argument alone, and each output alone, which leaves the other's incoming gradient undefined."""
    call = case.call(option, size, setting).cast(widest(backend), device)
    cotangents = draw_cotangents(call.run(backend))
    whole = call.differentiate(backend, cotangents)
    for name in call.tensors:
        alone = call.differentiate(backend, cotangents, wrt=(name,))
        assert_close({f"d{name}": alone[f"d{name}"]}, {f"d{name}": whole[f"d{name}"]}, widest(backend))
    parts = [call.differentiate(backend, {name: cotangent}) for name, cotangent in cotangents.items()]
    summed = {f"d{name}": sum(part[f"d{name}"] for part in parts) for name in call.tensors}
    assert_close(summed, {name: whole[name] for name in summed}, widest(backend))


@pytest.mark.grid(first=True)
def test_output_used_twice(case, option, backend, device, size):
    call = case.call(option, size).cast(widest(backend), device)
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]
    y = call.run(backend)["y"]
    once = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    twice = torch.autograd.grad(y.sum() + (2 * y).sum(), leaves)
    expected = {name: 3 * gradient for name, gradient in zip(call.tensors, once, strict=True)}
    assert_close(dict(zip(call.tensors, twice, strict=True)), expected, widest(backend))


@pytest.mark.grid(first=True)
def test_gradients_are_deterministic(case, option, backend, device, dtype, setting, size):
    call = case.call(option, size, setting).cast(dtype, device)
    assert_same_bits(call.differentiate(backend), call.differentiate(backend))


@pytest.mark.grid(first=True)
def test_no_grad_gives_the_same_outputs(case, option, backend, device, dtype, setting, size):
    """What is saved for the backward, or not, changes no output."""
    call = case.call(option, size, setting).cast(dtype, device)
    with torch.no_grad():
        outputs = call.run(backend)
    assert not any(output.requires_grad for output in outputs.values())
    assert_same_bits(outputs, {name: v for name, v in call.differentiate(backend).items() if name in outputs})
