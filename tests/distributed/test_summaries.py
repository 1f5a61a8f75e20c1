"""What a stretch does to a state, and to the gradient of one, against the operation that makes it with its outputs."""

import pytest
import torch

from ssmscan.distributed.scan import SUMMARISED
from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, Setting

ROWS = [
    pytest.param(case, option, setting, id=f"{case.name} {option.name} {setting.name}")
    for case in CASES
    if case.op in SUMMARISED
    for option in case.options
    for setting in (PLAIN, Setting("reverse", reverse=True))
    if case.has(option, *setting.needs)
]


@pytest.mark.parametrize(("case", "option", "setting"), ROWS)
def test_a_summary_is_what_the_scan_does_to_a_state(case, option, setting):
    # More than a segment, and more tokens than the plain sum takes at once.
    call = case.call(option, {**case.sizes[0], "b": 1, "l": 205}, setting)
    _, made = case.op(**call.tensors, **call.keywords, backend="reference")
    h0 = torch.randn(made.shape, dtype=made.dtype, requires_grad=True)
    y, h = case.op(**call.tensors, **call.keywords, h0=h0, backend="reference")
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, h0, dy)
    _, inputs, options = SUMMARISED[case.op].prepare(**call.tensors, **call.keywords)
    decay, s = SUMMARISED[case.op].summary(inputs, options)
    _, dh = SUMMARISED[case.op].summary(inputs, options, dy)
    for found, value in ((decay * h0 + s, h), (s, made), (dh, expected)):
        assert (found - value).abs().max() <= 1e-12 * max(value.abs().max().item(), 1.0)
