"""How a decode step runs: as one kernel, or in plain PyTorch."""

from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.registration import needs_grad


def fused(function: str, h: Tensor, *inputs: Tensor | None) -> bool:
    """Whether ``function`` advances the state ``h`` by its Triton kernel; ``inputs`` are the tensors that it reads.

    On a GPU, not in float64, nor where a derivative is asked for. Of an expanded state several elements are one number
    in memory, which PyTorch refuses to update.
    """
    on_gpu = choose(function, "auto", h.device.type, h.real.dtype) == "triton"
    return on_gpu and not needs_grad(h, *inputs) and 0 not in h.stride()
