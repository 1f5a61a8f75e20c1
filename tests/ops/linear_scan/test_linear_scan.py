"""What is particular to linear_scan: closed forms, its other definition, its defaults, its chunks and segments."""

import doctest
from dataclasses import replace

import pytest
import torch

from ssmscan import linear_scan, linear_scan_step
from ssmscan.backend import why_not
from ssmscan.ops.linear_scan.case import ALL, CASE, LOG_ALL
from ssmscan.testing import Call, Setting, Standard, assert_close, assert_same_bits

BACKENDS = [name for name in ("reference", *CASE.backends) if why_not(name, "cpu", torch.float32) is None]
INTERPRETED = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton interprets only where there is no GPU")
SIZE = {"b": 2, "l": 50, "d": 3}
SETTINGS = (
    Setting("h0", h0=True),
    Setting("reverse", h0=True, reverse=True),
    Setting("packed", h0=True, lengths=(0, 20, 1, 0, 29)),
    Setting("packed reverse", h0=True, reverse=True, lengths=(16, 0, 17, 17)),
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("function", [linear_scan, linear_scan_step], ids=lambda function: function.__name__)
def test_the_example_is_right(function):
    (example,) = doctest.DocTestFinder().find(function, function.__name__)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_a_of_one_sums(backend):
    x = torch.arange(40.0).view(1, 40, 1)
    y, h = linear_scan(x, torch.ones_like(x), backend=backend)
    assert torch.equal(y, x.cumsum(1))
    assert torch.equal(h, x.sum(1))


def test_a_of_zero_passes_on(backend):
    x = torch.randn(2, 20, 3)
    y, h = linear_scan(x, torch.zeros_like(x), backend=backend)
    assert torch.equal(y, x)
    assert torch.equal(h, x[:, -1])


def test_an_impulse_decays_geometrically(backend):
    x = torch.zeros(1, 40, 1)
    x[:, 3] = 1
    y, h = linear_scan(x, torch.full_like(x, -0.5), backend=backend)
    expected = torch.zeros_like(x)
    expected[0, 3:, 0] = (-0.5) ** torch.arange(37.0)
    assert torch.equal(y, expected)
    assert torch.equal(h, expected[:, -1])


def test_quadratic_form():
    """y = (c bᵀ ∘ M) x with M[t, j] the product of the decays after j up to t: a second oracle, without a loop."""
    call = CASE.call(LOG_ALL, SIZE)
    x, log_a, b, c = (call.tensors[name] for name in ("x", "log_a", "b", "c"))
    sums = log_a.cumsum(1)
    later = torch.ones(50, 50, dtype=torch.bool).tril()[:, :, None]
    matrix = torch.where(later, sums[:, :, None] - sums[:, None], -torch.inf).exp()
    y = c * torch.einsum("btjd,bjd->btd", matrix, b * x)
    assert_close({"y": call.run("reference")["y"]}, {"y": y}, torch.float64)


def test_gates_default_to_one(backend):
    call = CASE.call(ALL, SIZE, Setting("h0", h0=True)).cast(torch.float32)
    x, a, h0 = (call.tensors[name] for name in ("x", "a", "h0"))
    bare = linear_scan(x, a, h0=h0, backend=backend)
    ones = linear_scan(x, a, torch.ones_like(x), torch.ones_like(x), h0=h0, backend=backend)
    assert_same_bits(dict(zip("yh", bare, strict=True)), dict(zip("yh", ones, strict=True)))


def test_decay_and_its_logarithm(backend):
    """Their gradients are related by the chain rule."""
    call = CASE.call(LOG_ALL, SIZE).cast(torch.float32)
    a = call.tensors["log_a"].exp()
    plain = Call(CASE, {**{name: v for name, v in call.tensors.items() if name != "log_a"}, "a": a}, {})
    by_log, by_a = call.differentiate(backend), plain.differentiate(backend)
    by_a["dlog_a"] = by_a.pop("da") * a
    assert_close(by_log, by_a, torch.float32)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_levels_of_chunks(setting):
    """The torch backend at a length whose chunks of chunks have chunks."""
    length = 16 * 16 + 3
    if setting.lengths is not None:
        setting = replace(setting, lengths=(0, 1, 200, 16, length))
    call = CASE.call(ALL, {**SIZE, "b": 1, "l": length}, setting)
    assert_close(call.differentiate("torch"), call.differentiate("reference"), torch.float64)


def _in_segments(monkeypatch):
    """Segments of one tile, which only a long sequence of few channels would have."""
    from ssmscan.ops._triton.cover import Cover
    from ssmscan.ops.linear_scan import kernel_bwd, kernel_fwd

    for module in (kernel_fwd, kernel_bwd):
        monkeypatch.setattr(module, "cover", lambda batch, l, d, BD, *_: Cover(-(-d // BD), 16, -(-l // 16)))


def _check(call):
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@INTERPRETED
@pytest.mark.parametrize("option", [ALL, LOG_ALL], ids=lambda option: option.name)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_segments(monkeypatch, setting, option):
    """Each starts from the composed summaries of those before it, unless a packed sequence starts in between."""
    _in_segments(monkeypatch)
    _check(CASE.call(option, {**SIZE, "b": 1}, setting).cast(torch.float32))


@INTERPRETED
@pytest.mark.parametrize("lengths", [None, pytest.param((100, 0, 130, 45), marks=pytest.mark.slow)], ids=str)
def test_many_segments(monkeypatch, lengths):
    """More than the 16 that are composed at a time."""
    _in_segments(monkeypatch)
    setting = Setting("many", h0=True, lengths=lengths)
    _check(CASE.call(ALL, {"b": 1, "l": 275, "d": 3}, setting).cast(torch.float32))


def test_forward_mode_of_the_torch_backend():
    x, a = torch.ones(1, 3, 1), torch.full((1, 3, 1), 0.5)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: linear_scan(x, a, backend="torch")[0], x, strategy="forward-mode", vectorize=True
    )
    assert jacobian.view(3, 3).tolist() == [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]
