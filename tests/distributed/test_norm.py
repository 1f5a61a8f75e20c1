"""The part of a split norm that a rank makes alone: the kernels against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from ssmscan.distributed import norm


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_kernels(device, dtype, norm_before_gate):
    """In the interpreter and on a GPU: y, the squares and all gradients, of x and z that are slices."""
    pytest.importorskip("triton", reason="which Linux has")
    torch.manual_seed(0)
    d = 24
    wide, weight, dy = torch.randn(2, 5, 3 * d), torch.randn(d), torch.randn(2, 5, d)
    dsquares = torch.randn(2, 5, 1)
    found = []
    for make, kind, place in ((norm.gated, torch.float64, "cpu"), (norm._Gated.apply, dtype, device)):

        def given(tensor: Tensor, kind=kind, place=place) -> Tensor:
            # The same numbers in both.
            return tensor.to(dtype).to(place, kind)

        x, z = (part.requires_grad_() for part in given(wide)[..., :-d].split(d, -1))
        scale = given(weight).requires_grad_()
        results = make(x, scale, z, norm_before_gate)
        ways = given(dy), dsquares.to(results[1])
        found.append([*results, *torch.autograd.grad(results, (x, scale, z), ways)])
    assert found[1][0].dtype is dtype
    assert found[1][1].dtype is torch.float32
    for i, (expected, got) in enumerate(zip(*found, strict=True)):
        bound = 1e-5 if i == 1 else 8 * torch.finfo(dtype).eps
        assert torch.allclose(got.cpu().double(), expected, rtol=bound, atol=bound * expected.abs().max().item()), i
