"""Which backend runs an operation: the one written table, and the only place that probes for Triton and Numba.

| backend | runs on | dtypes |
|---|---|---|
| triton | NVIDIA's GPUs; with ``TRITON_INTERPRET=1`` the CPU too, for tests | float32, bfloat16, float16 |
| cpu | the CPU, compiled by Numba | all |
| torch | every device | all |
| reference | every device; a plain loop over time, for checking | all |

``backend="auto"`` takes the first of them that can run. A backend asked for by name runs or raises.

Numba keeps what it compiles in the package's folders, in the user's cache or in ``NUMBA_CACHE_DIR``; where it can write
to none of them, each process compiles anew.
"""

import os
from importlib.util import find_spec

import torch

from ssmscan.shapes import error

# MKL picks its code for exp at the first call. When several threads make that call at once, the result can be off by
# 1e-4 (seen in one of six processes with PyTorch 2.13); one thread makes it here.
torch.zeros(1, dtype=torch.float32, device="cpu").exp()

BACKENDS = ("triton", "cpu", "torch", "reference")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


TRITON = _installed("triton")
NUMBA = _installed("numba")
# Triton reads the same variable when it decorates a kernel, so it has to be set before the first call.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# PyTorch calls AMD's GPUs "cuda" too, for which the PTX in the kernels means nothing.
ROCM = torch.version.hip is not None


def why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run on ``device`` with ``dtype``, as "rule, got value"; None when it can."""
    if backend == "triton":
        if not TRITON:
            return "needs the package triton, got none installed"
        if device != "cuda" and not INTERPRET:
            return f"needs a CUDA tensor, got {device}"
        if device == "cuda" and ROCM:
            return "needs an NVIDIA GPU, got a ROCm device"
        if dtype is torch.float64:
            return "needs float32, bfloat16 or float16, got torch.float64"
    if backend == "cpu":
        if not NUMBA:
            return "needs the package numba, got none installed"
        if device != "cpu":
            return f"needs a CPU tensor, got {device}"
    return None


def choose(function: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend that runs: the one named, or for "auto" the best that can."""
    if backend == "auto":
        if device == "cuda" and why_not("triton", device, dtype) is None:
            return "triton"
        return "cpu" if device == "cpu" and NUMBA else "torch"
    if backend not in BACKENDS:
        raise ValueError(error(function, f"backend must be one of auto, {', '.join(BACKENDS)}", repr(backend)))
    reason = why_not(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'{function}: backend="{backend}" {reason}. Use backend="auto".')
    return backend
