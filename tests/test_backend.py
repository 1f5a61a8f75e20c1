"""Which backend is chosen."""

import pytest
import torch

from ssmscan import backend


@pytest.fixture
def machine(monkeypatch):
    """Sets what is installed, and whether kernels are interpreted."""

    def install(triton=True, numba=True, interpret=False, rocm=False):
        monkeypatch.setattr(backend, "TRITON", triton)
        monkeypatch.setattr(backend, "NUMBA", numba)
        monkeypatch.setattr(backend, "INTERPRET", interpret)
        monkeypatch.setattr(backend, "ROCM", rocm)

    return install


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "chosen"),
    [
        ("cuda", torch.float32, {}, "triton"),
        ("cuda", torch.bfloat16, {"numba": False}, "triton"),
        ("cuda", torch.float64, {}, "torch"),
        ("cuda", torch.float32, {"triton": False}, "torch"),
        ("cuda", torch.bfloat16, {"rocm": True}, "torch"),
        ("cpu", torch.float32, {"rocm": True}, "cpu"),
        ("cpu", torch.float32, {}, "cpu"),
        ("cpu", torch.float64, {}, "cpu"),
        ("cpu", torch.float16, {"numba": False}, "torch"),
        ("cpu", torch.float32, {"interpret": True}, "cpu"),
        ("cpu", torch.float32, {"numba": False, "interpret": True}, "torch"),
        ("mps", torch.float32, {}, "torch"),
        ("meta", torch.float32, {}, "torch"),
    ],
)
def test_auto(machine, device, dtype, installed, chosen):
    machine(**installed)
    assert backend.choose("f", "auto", device, dtype) == chosen
    assert backend.why_not(chosen, device, dtype) is None


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_a_named_backend_runs(machine, name):
    machine(interpret=True)
    assert backend.choose("f", name, "cpu", torch.float32) == name


@pytest.mark.parametrize(
    ("name", "device", "dtype", "installed", "reason"),
    [
        ("triton", "cuda", torch.float32, {"triton": False}, "needs the package triton, got none installed"),
        ("triton", "cpu", torch.float32, {}, "needs a CUDA tensor, got cpu"),
        ("triton", "cuda", torch.float64, {}, "needs float32, bfloat16 or float16, got torch.float64"),
        ("triton", "cuda", torch.float32, {"rocm": True}, "needs an NVIDIA GPU, got a ROCm device"),
        ("cpu", "cpu", torch.float32, {"numba": False}, "needs the package numba, got none installed"),
        ("cpu", "cuda", torch.float32, {}, "needs a CPU tensor, got cuda"),
    ],
)
def test_a_named_backend_that_cannot_run(machine, name, device, dtype, installed, reason):
    machine(**installed)
    with pytest.raises(RuntimeError) as caught:
        backend.choose("f", name, device, dtype)
    assert str(caught.value) == f'f: backend="{name}" {reason}. Use backend="auto".'


def test_an_unknown_backend():
    with pytest.raises(
        ValueError, match=r"^f: backend must be one of auto, triton, cpu, torch, reference, got 'gpu'\.$"
    ):
        backend.choose("f", "gpu", "cpu", torch.float32)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_plain_backends_run_anywhere(machine, name):
    machine(triton=False, numba=False)
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert backend.choose("f", name, device, dtype) == name
