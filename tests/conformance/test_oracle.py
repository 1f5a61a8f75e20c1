"""Outputs and every gradient against the float64 reference, into memory that was filled with NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch

from ssmscan.testing import PLAIN, Call, OpCase, Option, Setting, Size, Standard

PACKED_REVERSE = Setting("packed reverse", h0=True, reverse=True, lengths=(0, 1, 15, 16, 17, 0, 3))


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@lru_cache
def _standard(
    case: OpCase, option: Option, dtype: torch.dtype, setting: Setting, size: tuple, extreme: str | None, device: str
) -> tuple[Call, Standard]:
    """The same for all backends."""
    call = case.call(option, dict(size), setting, extreme=extreme).cast(dtype)
    standard = Standard.of(call, device)
    if device == "cuda":
        # A loop over thousands of tokens keeps gigabytes, which tests in other processes may need.
        torch.cuda.empty_cache()
    return call.to(device), standard


def _check(
    case: OpCase,
    option: Option,
    backend: str,
    device: str,
    dtype: torch.dtype,
    setting: Setting,
    size: Size,
    extreme: str | None = None,
) -> None:
    call, standard = _standard(case, option, dtype, setting, tuple(size.items()), extreme, device)
    _judge(call, standard, backend, dtype)


def _judge(call: Call, standard: Standard, backend: str, dtype: torch.dtype) -> None:
    with _poisoned():
        values = call.differentiate(backend, standard.cotangents)
    standard.judge(values, call.case, dtype)


def test_poison():
    """Else the tests below would not see what is left unwritten."""
    with _poisoned():
        assert torch.empty(3).isnan().all()


@pytest.mark.grid(every_size=True, interpret="values")
def test_outputs_and_gradients(case, option, backend, device, dtype, setting, size):
    _check(case, option, backend, device, dtype, setting, size)


@pytest.mark.grid(interpret="first", dtypes=(torch.float32, torch.bfloat16), settings=(PLAIN, PACKED_REVERSE))
def test_extremes(case, option, backend, device, dtype, setting, size, extreme):
    _check(case, option, backend, device, dtype, setting, size, extreme)


@pytest.mark.grid(needs=("dtype",), interpret="values")
def test_dtype_of_the_output(case, option, backend, device, dtype, size):
    """Narrower than x, or wider: y is rounded once, and the incoming gradient is read in its dtype."""
    asked = torch.bfloat16 if dtype.itemsize > 2 else torch.float32
    call = case.call(option, size).cast(dtype).set(dtype=asked)
    standard = Standard.of(call, device)
    assert standard.reference["y"].dtype is asked
    _judge(call.to(device), standard, backend, dtype)


@pytest.mark.grid(dtypes=(torch.bfloat16,))
def test_one_narrow_input(case, option, backend, device, dtype, size):
    """Under autocast a layer's x comes in bfloat16 and its decays in float32: y has x's dtype, a gradient its own."""
    wide = case.call(option, size).cast(torch.float32)
    call = wide.replace(x=wide.tensors["x"].to(dtype))
    standard = Standard.of(call, device)
    assert standard.reference["y"].dtype is dtype
    assert {n: standard.reference[f"d{n}"].dtype for n in call.tensors} == {n: t.dtype for n, t in call.tensors.items()}
    _judge(call.to(device), standard, backend, dtype)
