"""Decays above 1: while every state is zero, or small, no product of decays may turn it into NaN."""

import math

import numpy as np
import pytest
import torch

from ssmscan import linear_scan, matrix_scan, s4d, selective_scan, ssd
from ssmscan.testing import RMS_BOUND, assert_close, rms_ratio

L, INPUTS = 300, 6


def _inputs(*shape):
    """x is not zero at the last tokens alone."""
    x = torch.zeros(1, L, *shape)
    x[:, -INPUTS:] = torch.randn(1, INPUTS, *shape, generator=torch.Generator().manual_seed(0))
    return x


def _linear(a):
    return linear_scan, {"x": _inputs(2), "a": torch.full((1, L, 2), a)}


def _matrix(a):
    return matrix_scan, {"x": _inputs(2, 3), "log_a": torch.full((1, L, 2), math.log(a))}


def _selective(a):
    ones, A = torch.ones(1, L, 3), torch.full((2, 3), 2 * math.log(a))
    return selective_scan, {"x": _inputs(2), "dt": torch.full((1, L, 2), 0.5), "A": A, "B": ones, "C": ones}


def _ssd(a):
    ones, A = torch.ones(1, L, 1, 3), torch.full((2,), 2 * math.log(a))
    return ssd, {"x": _inputs(2, 3), "dt": torch.full((1, L, 2), 0.5), "A": A, "B": ones, "C": ones}


def _s4d(a):
    A = torch.complex(torch.full((2, 3), 2 * math.log(a)), torch.arange(3.0).expand(2, 3))
    one = torch.ones_like(A)
    return s4d, {"x": _inputs(2), "dt": torch.full((2,), 0.5), "A": A, "B": one, "C": one}


OPERATIONS = (_linear, _matrix, _selective, _ssd)
# What overflows: over the length, a segment or a chunk, over 16 tokens, and over four.
DECAYS = (1.5, 5.0, 300.0, 1e5)


def _check(make, decay, backend):
    """Outputs from inputs at the end, and gradients that reach back from outputs at the beginning."""
    op, tensors = make(decay)

    def run(backend, dtype):
        leaves = {
            name: t.to(dtype.to_complex() if t.is_complex() else dtype).requires_grad_() for name, t in tensors.items()
        }
        y, h = op(**leaves, **({"mode": "recurrent"} if op is s4d else {}), backend=backend)
        cotangent = torch.zeros_like(y)
        # So few that their gradients do not overflow themselves.
        cotangent[:, : 20 if decay < 10 else 4] = 1
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
        return {"y": y.detach(), "h": h.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    with np.errstate(all="ignore"):
        values = run(backend, torch.float32)
    assert all(value.isfinite().all() for value in values.values())
    assert_close(values, run("reference", torch.float64), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("make", OPERATIONS)
def test_inputs_after_a_long_rest(make, decay, backend):
    _check(make, decay, backend)


# ssd's matrices of decays overflow there: see its page.
@pytest.mark.parametrize(
    "make", [_linear, pytest.param(_matrix, marks=pytest.mark.slow), pytest.param(_selective, marks=pytest.mark.slow)]
)
def test_segments_of_the_kernels(make):
    _check(make, 5.0, "triton")


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_chunks_of_s4d(backend):
    """Ā^64 is a number, Ā^300 none."""
    _check(_s4d, 3.0, backend)


def test_a_decay_of_three_halves():
    x = torch.zeros(1, 300, 1)
    x[:, -20:] = 1
    y, _ = linear_scan(x, torch.full_like(x, 1.5), backend="torch")
    assert y[0, -1].item() == pytest.approx(2 * (1.5**20 - 1), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_rate_of_three(backend):
    x = torch.zeros(1, 64, 1, 1)
    x[:, -5:] = 1
    ones = torch.ones(1, 64, 1, 2)
    y, _ = ssd(x, ones[..., 0], torch.tensor([3.0]), ones, ones, backend=backend)
    assert y[0, -1].item() == pytest.approx(2 * (math.exp(15) - 1) / (math.exp(3) - 1), rel=1e-5)
    assert y[:, :-5].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_decays_of_packed_sequences_do_not_meet(backend):
    """One sequence grows beyond all numbers, and the next is as it would be alone."""
    x = torch.ones(1, 400, 2)
    a = torch.full_like(x, 0.5)
    a[:, :300] = 10.0
    bounds = torch.tensor([0, 300, 400])
    y, h = linear_scan(x, a, cu_seqlens=bounds, backend=backend)
    z, g = linear_scan(x[:, 300:], a[:, 300:], backend=backend)
    assert rms_ratio(y[:, 300:], z) <= RMS_BOUND[torch.float32]
    assert rms_ratio(h[1:], g) <= RMS_BOUND[torch.float32]
    assert y[0, 299].isinf().all()
