"""What is particular to matrix_scan: its dense form, the cumulative decay, wide matrices, its segments."""

import doctest

import pytest
import torch

from ssmscan import matrix_scan, matrix_scan_step
from ssmscan.backend import why_not
from ssmscan.ops.matrix_scan.case import CASE, LOG
from ssmscan.testing import Setting, Standard, assert_close

BACKENDS = [name for name in ("reference", *CASE.backends) if why_not(name, "cpu", torch.float32) is None]
INTERPRETED = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton interprets only where there is no GPU")
SIZE = {"b": 1, "l": 50, "r": 2, "c": 3}
SETTINGS = (
    Setting("h0", h0=True),
    Setting("reverse", h0=True, reverse=True),
    Setting("packed", h0=True, lengths=(0, 20, 1, 0, 29)),
    Setting("packed reverse", h0=True, reverse=True, lengths=(16, 0, 17, 17)),
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("function", [matrix_scan, matrix_scan_step], ids=lambda function: function.__name__)
def test_the_example_is_right(function):
    (example,) = doctest.DocTestFinder().find(function, function.__name__)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_decay_of_one_sums(backend):
    x = torch.arange(120.0).view(1, 20, 2, 3)
    y, h = matrix_scan(x, torch.zeros(1, 20, 2), backend=backend)
    assert torch.equal(y, x.cumsum(1))
    assert torch.equal(h, x.sum(1))


def _dense(x, total, h0):
    """y_t = Σ_j exp(A_t − A_j) x_j + exp(A_t) h0, without a loop."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[:, :, None]
    decay = torch.where(later, total[:, :, None] - total[:, None], -torch.inf).exp()
    return torch.einsum("btjr,bjrc->btrc", decay, x) + total.exp()[..., None] * h0[:, None]


@pytest.mark.parametrize("cumulative", [False, True], ids=["log_a", "cumsum_log_a"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_dense_form(reverse, cumulative):
    """Of every backend in its widest dtype, by either argument, which both are sums in scan order."""
    call = CASE.call(LOG, SIZE, Setting("h0", h0=True))
    x, log_a, h0 = (call.tensors[name] for name in ("x", "log_a", "h0"))
    ordered = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    total = ordered(ordered(log_a).cumsum(1))
    expected = ordered(_dense(ordered(x), ordered(total), h0))
    for name in BACKENDS:
        dtype = torch.float32 if name == "triton" else torch.float64
        decay = {"cumsum_log_a": total.to(dtype)} if cumulative else {"log_a": log_a.to(dtype)}
        y, h = matrix_scan(x.to(dtype), **decay, h0=h0.to(dtype), reverse=reverse, backend=name)
        assert_close({"y": y, "h": h}, {"y": expected, "h": expected[:, 0 if reverse else -1]}, dtype)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_cumulative_decay_of_packed_sequences(backend, reverse):
    """The sum starts anew in each; its gradient is that of the differences."""
    setting = Setting("packed", h0=True, reverse=reverse, lengths=(3, 0, 17, 20))
    call = CASE.call(LOG, SIZE, setting).cast(torch.float32)
    log_a = call.tensors["log_a"].requires_grad_()
    parts = [part.flip(1).cumsum(1).flip(1) if reverse else part.cumsum(1) for part in log_a.split((3, 17, 20), 1)]
    total = torch.cat(parts, 1)
    y, h = matrix_scan(call.tensors["x"], log_a, h0=call.tensors["h0"], **call.keywords, backend=backend)
    z, g = matrix_scan(
        call.tensors["x"], cumsum_log_a=total, h0=call.tensors["h0"], **call.keywords, backend=backend
    )  # fmt: skip
    assert_close({"y": z, "h": g}, {"y": y, "h": h}, torch.float32)
    (by_log,), (by_sum,) = (torch.autograd.grad(v.square().sum(), log_a) for v in (y, z))
    assert_close({"dlog_a": by_sum}, {"dlog_a": by_log}, torch.float32)


def test_each_row_is_by_itself(backend):
    """Columns share their row's decay, and rows share nothing: the same rows in another order, cut in two."""
    call = CASE.call(LOG, {"b": 1, "l": 20, "r": 3, "c": 5}).cast(torch.float32)
    x, log_a = call.tensors["x"], call.tensors["log_a"]
    y, _ = matrix_scan(x, log_a, backend=backend)
    order = [2, 0, 1]
    rows, _ = matrix_scan(x[:, :, order], log_a[:, :, order], backend=backend)
    assert_close({"y": rows}, {"y": y[:, :, order]}, torch.float32)
    columns, _ = matrix_scan(x[..., 3:], log_a, backend=backend)
    assert_close({"y": columns}, {"y": y[..., 3:]}, torch.float32)


def _check(call):
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@INTERPRETED
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_segments(monkeypatch, setting):
    """Each starts from the composed summaries of those before it, unless a packed sequence starts in between."""
    from ssmscan.ops._triton.cover import Cover
    from ssmscan.ops.matrix_scan import kernel_bwd, kernel_fwd

    for module in (kernel_fwd, kernel_bwd):
        monkeypatch.setattr(module, "cover", lambda batch, l, d, BD, *_: Cover(-(-d // BD), 16, -(-l // 16)))
    _check(CASE.call(LOG, SIZE, setting).cast(torch.float32))


@INTERPRETED
def test_narrow_decays_and_wide_rows():
    """A bfloat16 log_a, whose gradient is summed over two programs."""
    call = CASE.call(LOG, {"b": 1, "l": 17, "r": 1, "c": 65}).cast(torch.float32)
    call = call.replace(log_a=call.tensors["log_a"].bfloat16())
    standard = Standard.of(call)
    values = call.differentiate("triton", standard.cotangents)
    standard.judge(values, CASE, torch.float32)
