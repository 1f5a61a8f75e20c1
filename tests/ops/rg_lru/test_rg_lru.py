"""What is particular to rg_lru: the scan that it is, its gradient near a = 1, its segments."""

import doctest
import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from ssmscan import linear_scan, rg_lru, rg_lru_step
from ssmscan.backend import why_not
from ssmscan.ops.rg_lru.case import ALL, CASE, UNSCALED
from ssmscan.testing import Setting, Standard, assert_close, assert_same_bits

BACKENDS = [name for name in ("reference", *CASE.backends) if why_not(name, "cpu", torch.float32) is None]
INTERPRETED = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton interprets only where there is no GPU")
SIZE = {"b": 1, "l": 100, "d": 3}
SETTINGS = (
    Setting("h0", h0=True),
    Setting("reverse", h0=True, reverse=True),
    Setting("packed", h0=True, lengths=(0, 20, 1, 0, 79)),
    Setting("packed reverse", h0=True, reverse=True, lengths=(64, 0, 17, 19)),
)
STARTS = tuple(replace(setting, h0=False) for setting in SETTINGS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("function", [rg_lru, rg_lru_step], ids=lambda function: function.__name__)
def test_the_example_is_right(function):
    (example,) = doctest.DocTestFinder().find(function, function.__name__)
    assert doctest.DocTestRunner().run(example).failed == 0


def _scan(call, first):
    """By the paper's formulas, with a gain of 1 at the tokens ``first``; a second oracle."""
    x, i, r, parameter = (call.tensors[name] for name in ALL.tensors)
    log_a = -8 * r.sigmoid() * F.softplus(parameter)
    gain = (1 - (2 * log_a).exp()).sqrt().index_fill(1, torch.tensor(first, dtype=torch.int64), 1.0)
    call = call.set(scale_first=None)
    y, h = linear_scan(gain * i.sigmoid() * x, log_a=log_a, h0=call.tensors.get("h0"), **call.keywords)
    return {"y": y, "h": h}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_it_is_a_linear_scan(setting):
    call = CASE.call(ALL, SIZE, setting)
    assert_close(call.run("reference"), _scan(call, []), torch.float64)


@pytest.mark.parametrize("setting", STARTS, ids=lambda setting: setting.name)
def test_first_tokens_unscaled(setting):
    """Those of each sequence in scan order, of an empty one none."""
    lengths = setting.lengths or (SIZE["l"],)
    first = [end - 1 if setting.reverse else end - n for n, end in zip(lengths, accumulate(lengths), strict=True) if n]
    call = CASE.call(UNSCALED, SIZE, setting)
    assert_close(call.run("reference"), _scan(call, first), torch.float64)


@pytest.mark.parametrize("setting", STARTS[1::2], ids=lambda setting: setting.name)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_of_first_tokens_unscaled(backend, setting):
    call = CASE.call(UNSCALED, SIZE, setting).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate(backend, standard.cotangents), CASE, torch.float32)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_continued_sequence_has_no_first_token(setting):
    call = CASE.call(UNSCALED, SIZE, setting)
    assert_same_bits(call.run("reference"), call.set(scale_first=None).run("reference"))


def test_states_keep_the_size_of_the_inputs(backend):
    """White noise of variance 1 makes states of variance 1, whatever the memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 16, generator=generator)
    open_gate = torch.full_like(x, 20.0)
    y, _ = rg_lru(x, open_gate, open_gate, torch.full((16,), -4.0), backend=backend)
    assert 0.8 < y[:, 100:].square().mean() < 1.25


@pytest.mark.parametrize("parameter", [-9.0, -16.0, -40.0, -200.0])
def test_gradient_is_bounded_near_one(backend, parameter):
    """√(1 − a²) has no derivative at a = 1; of one step from zero, d log a is -x·min(a²/√(1 − a²), 1000)."""
    x = torch.full((1, 1, 1), 2.0)
    gate, recurrence = torch.full((1, 1, 1), 40.0), torch.zeros(1, 1, 1).requires_grad_()
    a_param = torch.full((1,), parameter).requires_grad_()
    y, _ = rg_lru(x, gate, recurrence, a_param, backend=backend)
    dr, da = torch.autograd.grad(y.sum(), (recurrence, a_param))
    rate = 8 * math.log1p(math.exp(parameter))
    gain = math.sqrt(-math.expm1(-rate))
    dlog_a = -2 * math.exp(-rate) / max(gain, 1e-3)
    assert y.item() == pytest.approx(2 * gain, rel=1e-5, abs=1e-15)
    assert dr.item() == pytest.approx(-rate * dlog_a / 4, rel=1e-5, abs=1e-35)
    assert da.item() == pytest.approx(-8 * dlog_a / 2 / (1 + math.exp(-parameter)), rel=1e-5, abs=1e-35)


@INTERPRETED
@pytest.mark.parametrize(
    ("option", "setting"),
    [*((ALL, setting) for setting in SETTINGS), *((UNSCALED, setting) for setting in STARTS[::2])],
    ids=lambda value: value.name,
)
def test_segments(monkeypatch, option, setting):
    """Each starts from the composed summaries of those before it, unless a packed sequence starts in between."""
    from ssmscan.ops._triton.cover import Cover
    from ssmscan.ops.rg_lru import kernel_bwd, kernel_fwd

    for module in (kernel_fwd, kernel_bwd):
        monkeypatch.setattr(
            module, "cover", lambda batch, l, d, BD, _, rows=16: Cover(-(-d // BD), rows, -(-l // rows))
        )
    call = CASE.call(option, SIZE, setting).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@INTERPRETED
@pytest.mark.parametrize("rate", [1e-12, 1e-6, 1e-3, 0.1, 0.1249, 0.1251, 0.5, 3.0, 100.0])
def test_gain_on_both_sides_of_its_series(rate):
    """Relative error of √(1 − a²) over all memories; one open step from zero with x = 1 is that number."""
    a_param = torch.tensor([rate / 8], dtype=torch.float64).expm1().log().float()
    exact = math.sqrt(-math.expm1(-16 * math.log1p(math.exp(a_param.item()))))
    one, open_gate = torch.ones(1, 1, 1), torch.full((1, 1, 1), 40.0)
    y, _ = rg_lru(one, open_gate, open_gate, a_param, backend="triton")
    assert y.item() == pytest.approx(exact, rel=2e-6)
