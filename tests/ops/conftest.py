import pytest
import torch
from step_table import pretend

from ssmscan import backend as available

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Where a step runs by its kernel."""
    return _device(request.param, monkeypatch)


@pytest.fixture(params=["plain", "cpu", CUDA])
def place(request, monkeypatch):
    """Where a step runs by its kernel, or in plain PyTorch."""
    return "cpu" if request.param == "plain" else _device(request.param, monkeypatch)


def _device(name, monkeypatch):
    if available.why_not("triton", name, torch.float32) is not None:
        pytest.skip("the kernels are interpreted where there is no GPU")
    if name == "cpu":
        pretend(monkeypatch.setattr)
    return name


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    if available.TRITON:
        from ssmscan.ops._triton.launch import Kernel

        def launch(kernel, *arguments, launch=Kernel.launch):
            names.append(kernel.function.__name__)
            launch(kernel, *arguments)

        monkeypatch.setattr(Kernel, "launch", launch)
    return names


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
