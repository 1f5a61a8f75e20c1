"""The kernel of the decode step, which the step function takes on a GPU only."""

import pytest
import torch

from ssmscan import backend

if backend.why_not("triton", "cpu", torch.float32) is not None:
    pytest.skip("the kernel is interpreted where there is no GPU", allow_module_level=True)

from ssmscan.ops.causal_conv1d import autograd, kernel_step, reference


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("b", "d", "w"), [(2, 5, 4), (1, 130, 2), (3, 1, 8), (0, 3, 3)])
def test_against_the_reference(b, d, w, with_bias, silu):
    torch.manual_seed(0)
    x, weight, h = torch.randn(d, b).t(), torch.randn(d, w), torch.randn(b, d, w - 1).transpose(1, 2)
    bias = torch.randn(d) if with_bias else None
    expected_h = h.clone()
    expected = reference.causal_conv1d_step(x, weight, bias, expected_h, silu)
    torch.testing.assert_close(kernel_step.step(x, weight, bias, h, silu), expected)
    assert torch.equal(h, expected_h)


def test_registered_operator():
    x, weight, h = torch.randn(2, 5), torch.randn(5, 4), torch.randn(2, 3, 5)
    torch.library.opcheck(torch.ops.ssmscan.causal_conv1d_step.default, (x, weight, None, h, True))
    compiled = torch.compile(autograd.causal_conv1d_step, fullgraph=True, backend="aot_eager")
    before = h.clone()
    y = compiled(x, weight, None, h, True)
    torch.testing.assert_close(y, reference.causal_conv1d_step(x, weight, None, before, True))
    assert torch.equal(h, before)
