"""What a stretch does to a state, and to the gradient of one, against the operation that makes it with its outputs."""

import pytest
import torch

from ssmscan import selective_scan, ssd
from ssmscan.ops.cases import CASES
from ssmscan.ops.selective_scan.summary import summary as selective_scan_summary
from ssmscan.ops.ssd.summary import summary as ssd_summary
from ssmscan.testing import PLAIN, Setting

SUMMARIES = {ssd: ssd_summary, selective_scan: selective_scan_summary}
ROWS = [
    pytest.param(case, option, setting, id=f"{case.name} {option.name} {setting.name}")
    for case in CASES
    if case.op in SUMMARIES
    for option in case.options
    for setting in (PLAIN, Setting("reverse", reverse=True))
    if case.has(option, *setting.needs)
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("case", "option", "setting"), ROWS)
def test_a_summary_is_what_the_scan_does_to_a_state(case, option, setting, backend):
    # More than a segment, and more tokens than the plain sum takes at once.
    call = case.call(option, {**case.sizes[0], "b": 1, "l": 205}, setting)
    _, made = case.op(**call.tensors, **call.keywords, backend="reference")
    h0 = torch.randn(made.shape, dtype=made.dtype, requires_grad=True)
    y, h = case.op(**call.tensors, **call.keywords, h0=h0, backend="reference")
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, h0, dy)
    dtype = torch.float64 if backend == "torch" else torch.float32
    tensors = {name: tensor.to(dtype) for name, tensor in call.tensors.items()}
    summary = SUMMARIES[case.op]
    decay, s = summary(**tensors, **call.keywords, backend=backend)
    _, dh = summary(**tensors, **call.keywords, backend=backend, dy=dy.to(dtype))
    bound = 1e-12 if backend == "torch" else 1e-5
    for found, value in ((decay * h0 + s, h), (s, made), (dh, expected)):
        assert (found - value).abs().max() <= bound * max(value.abs().max().item(), 1.0)
