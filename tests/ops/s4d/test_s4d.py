"""What the conformance suite cannot express: the modes against each other, limits, initial poles."""

import math

import pytest
import torch

from ssmscan import s4d, s4d_step
from ssmscan.ops import s4d_lin, s4d_real


def _system(d, n, dtype=torch.complex128):
    generator = torch.Generator().manual_seed(0)
    B, C = (torch.randn(d, n, generator=generator, dtype=dtype) for _ in range(2))
    A = s4d_lin(d, n) if dtype.is_complex else s4d_real(d, n)
    dt, D = torch.linspace(0.01, 0.3, d).double(), torch.ones(d).double()
    return dt, A.to(dtype), B, C, D


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
# Around a chunk of 64 steps, and beyond a group of 16 chunks.
@pytest.mark.parametrize("l", [1, 63, 64, 65, 1100])
def test_modes_agree(dtype, l):
    """The FFT, the chunks, and the step."""
    system = _system(2, 3, dtype)
    x, h0 = torch.randn(2, l, 2).double(), torch.randn(2, 2, 3, dtype=dtype)
    y, h = s4d(x, *system, mode="conv", h0=h0)
    for backend in ("auto", "torch"):
        z, g = s4d(x, *system, mode="recurrent", h0=h0, backend=backend)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(g, h)
    ys = torch.stack([s4d_step(x[:, t], *system, h=h0) for t in range(l)], 1)
    torch.testing.assert_close(ys, y)
    torch.testing.assert_close(h0, h)


def test_conjugate_pairs_are_a_real_system_of_twice_the_size():
    dt, A, B, C, D = _system(2, 3)
    x = torch.randn(1, 50, 2).double()
    whole = [torch.cat([p, p.conj()], 1) for p in (A, B, C)]
    y, _ = s4d(x, dt, A, B, C, D)
    # Of the whole set of poles the sum is real, and counted twice.
    doubled, _ = s4d(x, dt, *whole, 2 * D)
    torch.testing.assert_close(doubled, 2 * y)


@pytest.mark.parametrize("A", [0.0, 1e-12, -1e-5, -1e-2, -0.5, -3.0, 1e-5j, -1e-2 + 5j, 2j * math.pi - 1e-9])
def test_hold_is_exact(A):
    """One step from zero leaves B·(e^(dt·A) - 1)/A, here summed as a series in float64."""
    dtype = torch.complex128 if isinstance(A, complex) else torch.float64
    exact = sum(A**k / math.factorial(k + 1) for k in range(60))
    one = torch.ones(1, 1, dtype=dtype)
    for width, tolerance in ((dtype, 1e-13), (torch.complex64 if dtype.is_complex else torch.float32, 1e-6)):
        x = torch.ones(1, 1, 1, dtype=width.to_real())
        _, h = s4d(x, x[0, 0], (A * one).to(width), one.to(width), one.to(width))
        rounded = (A * one).to(width).item()
        error = abs(h.item() - sum(rounded**k / math.factorial(k + 1) for k in range(60)))
        assert error <= tolerance * max(abs(exact), 1)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_fused_backends_refuse_the_fft(backend, monkeypatch):
    monkeypatch.setattr("ssmscan.backend.why_not", lambda *_: None)
    x, system = torch.randn(1, 4, 2).float(), [p.float() for p in _system(2, 3, torch.float64)]
    with pytest.raises(RuntimeError, match=rf'^s4d: backend="{backend}" needs mode="recurrent", got mode="conv"\.'):
        s4d(x, *system, mode="conv", backend=backend)


@pytest.mark.parametrize("bounds", [[0, 1100], [0, 3, 3, 67, 130, 195, 1100]])
def test_packed_modes_agree(bounds):
    """Sequences shorter and longer than a chunk of 64 steps, and beyond 16 chunks."""
    system = _system(2, 3)
    bounds = torch.tensor(bounds)
    x, h0 = torch.randn(1, 1100, 2).double(), torch.randn(len(bounds) - 1, 2, 3, dtype=torch.complex128)
    for reverse in (False, True):
        y, h = s4d(x, *system, h0=h0, cu_seqlens=bounds, reverse=reverse, backend="cpu")
        for mode in ("conv", "recurrent"):
            z, g = s4d(x, *system, h0=h0, cu_seqlens=bounds, reverse=reverse, mode=mode, backend="torch")
            torch.testing.assert_close(z, y)
            torch.testing.assert_close(g, h)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_auto_is_recurrent(backend):
    """To the last bit; the FFT rounds otherwise."""
    system = _system(2, 3)
    x = torch.randn(2, 300, 2).double()
    y, h = s4d(x, *system, backend=backend)
    z, g = s4d(x, *system, mode="recurrent", backend=backend)
    assert torch.equal(y, z)
    assert torch.equal(h, g)
    assert not torch.equal(y, s4d(x, *system, mode="conv", backend=backend)[0])


def test_initial_poles():
    assert s4d_lin(2, 3).tolist() == [[complex(-0.5, float(torch.tensor(math.pi * k))) for k in range(3)]] * 2
    assert s4d_real(2, 3).tolist() == [[-1, -2, -3]] * 2
    assert s4d_lin(3, 4).is_contiguous()
    assert s4d_real(3, 4).is_contiguous()


def test_initial_poles_under_other_defaults():
    """A is complex64 or float32 whatever the default dtype, on the default device, as a layer's parameters are."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert s4d_lin(2, 3).dtype is torch.complex64
        assert s4d_real(2, 3).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert s4d_lin(2, 3).is_meta
        assert s4d_real(2, 3).is_meta


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_under_another_default_device_and_dtype(backend):
    x, system = torch.randn(1, 70, 2), [p.float() for p in _system(2, 3, torch.float64)]
    bounds = torch.tensor([0, 3, 70])
    expected = [s4d(x, *system, cu_seqlens=given, backend=backend) for given in (None, bounds)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            values = [s4d(x, *system, cu_seqlens=given, backend=backend) for given in (None, bounds)]
    finally:
        torch.set_default_dtype(torch.float32)
    for (y, h), (z, g) in zip(values, expected, strict=True):
        assert torch.equal(y, z)
        assert torch.equal(h, g)
