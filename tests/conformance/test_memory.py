"""Reads and writes stay inside the tensors: guard bands before and after each, and no word left unwritten."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

from ssmscan.testing import assert_same_bits, draw_cotangents

BAND = 4096


class _Guards:
    """Tensors in the middle of wider buffers of NaN, whose bands must stay as they are."""

    def __init__(self):
        self.buffers = []

    def place(self, shape, dtype, device):
        numel = torch.Size(shape).numel()
        buffer = torch.full(
            (numel + 2 * BAND,), torch.nan if dtype.is_floating_point else 99, dtype=dtype, device=device
        )
        self.buffers.append((buffer, numel))
        return buffer[BAND : BAND + numel].view(shape)

    def copy(self, tensor):
        return self.place(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self):
        for buffer, numel in self.buffers:
            bands = torch.cat([buffer[:BAND], buffer[BAND + numel :]])
            assert (bands.isnan() if bands.is_floating_point() else bands == 99).all(), "written outside of a tensor"

    @contextmanager
    def allocations(self):
        """Within, new tensors are placed like that too, as far as they are asked for by these names."""

        def empty(*shape, dtype=None, device=None, **_):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.place(shape, dtype or torch.get_default_dtype(), device or "cpu")

        def new_empty(tensor, *shape, dtype=None, device=None, **_):
            return empty(*shape, dtype=dtype or tensor.dtype, device=device or tensor.device)

        def empty_like(tensor, dtype=None, device=None, **_):
            return empty(*tensor.shape, dtype=dtype or tensor.dtype, device=device or tensor.device)

        def from_numpy(array):
            """Numba's outputs, which come from NumPy's empty."""
            return empty(*array.shape, dtype=torch.float64 if array.dtype == "float64" else torch.float32)

        with ExitStack() as stack:
            for place, name, make in (
                (torch, "empty", empty),
                (torch, "from_numpy", from_numpy),
                (torch, "zeros", lambda *shape, **keywords: empty(*shape, **keywords).zero_()),
                (torch, "empty_like", empty_like),
                (torch, "zeros_like", lambda tensor, **keywords: empty_like(tensor, **keywords).zero_()),
                (torch.Tensor, "new_empty", new_empty),
                (torch.Tensor, "new_zeros", lambda *shape, **keywords: new_empty(*shape, **keywords).zero_()),
            ):
                stack.enter_context(patch.object(place, name, make))
            yield


@pytest.mark.grid(every_size=True, interpret="first")
def test_guard_bands(case, option, backend, device, dtype, setting, size):
    """The band around an input holds NaN, so that a read outside shows in the result."""
    call = case.call(option, size, setting).cast(dtype, device)
    cotangents = draw_cotangents(call.run(backend))
    expected = call.differentiate(backend, cotangents)
    guards = _Guards()
    guarded = call.each(guards.copy, tuple(call.tensors))
    if setting.lengths is not None:
        guarded = guarded.set(cu_seqlens=guards.copy(call.keywords["cu_seqlens"]))
    incoming = {name: guards.copy(cotangent) for name, cotangent in cotangents.items()}
    with guards.allocations():
        values = guarded.differentiate(backend, incoming)
    guards.check()
    assert_same_bits(values, expected)


@pytest.mark.grid(first=True, backends=("cpu", "triton"))
def test_the_fused_backends_allocate_under_guard(case, option, backend, device, size):
    """Else the test above would watch the inputs alone."""
    call = case.call(option, size).cast(torch.float32, device)
    guards = _Guards()
    with guards.allocations():
        values = call.differentiate(backend)
    placed = {buffer.untyped_storage().data_ptr() for buffer, _ in guards.buffers}
    # The gradients of parameters may come from autograd around the operator.
    own = ["y", *(f"d{name}" for name in call.tensors if name in case.sequence)]
    missing = [name for name in own if values[name].untyped_storage().data_ptr() not in placed]
    assert not missing, f"{missing} are not made by torch.empty and the like"
