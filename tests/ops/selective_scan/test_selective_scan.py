"""What is particular to selective_scan: its examples, closed forms, and the segments and runs of its kernels."""

import doctest
from importlib import import_module

import pytest
import torch

from ssmscan import selective_scan, selective_scan_step
from ssmscan.backend import why_not
from ssmscan.ops.selective_scan.autograd import SPAN
from ssmscan.ops.selective_scan.case import ALL, CASE
from ssmscan.testing import Setting, assert_close, assert_same_bits

BACKENDS = [name for name in ("reference", *CASE.backends) if why_not(name, "cpu", torch.float32) is None]
INTERPRETED = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton interprets only where there is no GPU")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("function", [selective_scan, selective_scan_step], ids=lambda function: function.__name__)
def test_the_example_is_right(function):
    (example,) = doctest.DocTestFinder().find(function, function.__name__)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_no_decay_sums(backend):
    """A = 0 and steps of 1: y counts the tokens, for each of the two states."""
    x, B = torch.ones(1, 20, 1), torch.ones(1, 20, 2)
    y, h = selective_scan(x, x, torch.zeros(1, 2), B, B, backend=backend)
    assert torch.equal(y, 2 * x.cumsum(1))
    assert torch.equal(h, torch.full((1, 1, 2), 20.0))


def test_softplus_keeps_its_digits(backend):
    """log(1 + exp(x)) in float32 has none left below -16; here B = C = 1 and one token, so that y is the step size."""
    dt = torch.tensor([-80.0, -30.0, -17.0, -9.2, -7.0, -1.0, 0.0, 1.0, 19.0, 21.0, 1e4]).view(1, 1, -1)
    one = torch.ones(1, 1, 1)
    y, _ = selective_scan(torch.ones_like(dt), dt, torch.zeros(11, 1), one, one, dt_softplus=True, backend=backend)
    expected = torch.logaddexp(dt.double(), torch.zeros(()).double())
    assert ((y - expected).abs() <= 1e-5 * expected).all()


@pytest.mark.parametrize("first", [0, 1])
def test_a_group_is_a_scan_of_its_own(backend, first):
    call = CASE.call(ALL, {"b": 1, "l": 9, "d": 6, "n": 3}).cast(torch.float32)
    tensors = dict(call.tensors)
    for name in "BC":
        tensors[name] = torch.stack([tensors[name], tensors[name].flip(1)], 2)
    y, _ = selective_scan(**tensors, **call.keywords, backend=backend)
    own = slice(3 * first, 3 * first + 3)
    alone = {name: t[:, :, own] if name in ("x", "dt", "z") else t[own] for name, t in tensors.items()}
    alone |= {name: tensors[name][:, :, first] for name in "BC"}
    expected, _ = selective_scan(**alone, **call.keywords, backend=backend)
    assert_close({"y": y[:, :, own]}, {"y": expected}, torch.float32)


@INTERPRETED
@pytest.mark.parametrize(
    "setting",
    [
        Setting("reverse", h0=True, reverse=True),
        Setting("packed", h0=True, lengths=(0, 20, 1, 0, 29)),
        Setting("packed reverse", h0=True, reverse=True, lengths=(16, 0, 17, 17)),
    ],
    ids=lambda setting: setting.name,
)
def test_segments(setting, monkeypatch):
    """Cut into segments, of several spans between saved states, the sequence gives the same; twice, the same bits."""
    monkeypatch.setattr(import_module("ssmscan.ops.selective_scan.plan"), "SHORTEST_SEGMENT", 8)
    for module in ("kernel_fwd", "kernel_bwd"):
        monkeypatch.setattr(import_module(f"ssmscan.ops.selective_scan.{module}"), "SPAN", 16)
    call = CASE.call(ALL, {"b": 1, "l": 50, "d": 3, "n": 2}, setting).cast(torch.float32)
    values = call.differentiate("triton")
    assert_close(values, call.differentiate("torch"), torch.float32)
    assert_same_bits(values, call.differentiate("triton"))


@INTERPRETED
@pytest.mark.parametrize(
    ("batch", "l", "d", "segments"),
    [
        (4, 16384, 1536, 5),
        (2, 16384, 4096, 4),
        (2, 32768, 1536, 11),
        (8, 8192, 1536, 1),
        (1, 256, 64, 3),
        (1, 150, 64, 1),
    ],
)
def test_few_walkers_of_the_backward_get_many_segments(batch, l, d, segments):
    """96, 128 and 48 walkers fill an H200 so, and 192 without segments; a segment has at least 64 steps."""
    cover = import_module("ssmscan.ops.selective_scan.plan").cover
    config = import_module("ssmscan.ops.selective_scan.configs").backward_config(16)
    found = cover(batch, l, d, 1, config, SPAN)
    assert found.segments == segments
    assert found.segments * found.length >= l


@INTERPRETED
def test_nothing_is_made_of_memory_that_was_not_written(monkeypatch):
    """Whatever it held: the sum of two infinities warns here, and a warning is an error."""
    empty = torch.Tensor.new_empty

    def infinite(*arguments, **keywords):
        tensor = empty(*arguments, **keywords)
        if tensor.is_floating_point():
            tensor.fill_(torch.inf).view(-1)[::3] = -torch.inf
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", infinite)
    call = CASE.call(ALL, {"b": 1, "l": 50, "d": 140, "n": 2}, Setting("reverse", h0=True, reverse=True))
    call = call.cast(torch.float32)
    assert_close(call.differentiate("triton"), call.differentiate("torch"), torch.float32)
