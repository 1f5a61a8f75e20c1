"""What the conformance suite does not say of ssd: its dense form, D by element, documents with NaN, many segments."""

import pytest
import torch

from ssmscan import backend as available
from ssmscan.ops.ssd import plain
from ssmscan.ops.ssd.case import CASE, ELEMENTWISE, LAYER
from ssmscan.ops.ssd.op import ssd, ssd_step
from ssmscan.testing import Setting, Standard, assert_close, rms_ratio, same_bits, widest

SIZE = {"b": 2, "l": 37, "h": 4, "p": 3, "g": 2, "n": 5}
WHOLE = {"b": 1, "l": 32, "h": 2, "p": 16, "g": 1, "n": 16}
LENGTHS = (0, 1, 15, 16, 17, 0, 3)
BACKENDS = [name for name in CASE.backends if available.why_not(name, "cpu", torch.float32) is None]
ROWS = [pytest.param(name, marks=[pytest.mark.slow] if name == "triton" else []) for name in BACKENDS]


def _dense(x, dt, A, B, C):
    """y = M·x with M_ij = exp(log-decays from j+1 to i)·(C_i·B_j)·dt_j: quadratic in the length, no recurrence."""
    per_group = x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(per_group, 2) for v in (B, C))
    log_a = dt * A
    i = torch.arange(x.shape[1])
    between = (i[:, None, None] >= i) & (i > i[:, None])  # i, j, k: j < k <= i
    sums = torch.einsum("ijk,bkh->bhij", between.double(), log_a)
    decay = torch.where(i[:, None] >= i, sums.exp(), 0)
    return torch.einsum("bhij,bihn,bjhn,bjh,bjhp->bihp", decay, C, B, dt, x)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_dense_form(backend):
    if backend not in ("reference", *BACKENDS):
        pytest.skip("numba is not installed")
    tensors = CASE.draw(SIZE, CASE.options[1])
    y, _ = ssd(**tensors, backend=backend)
    assert rms_ratio(y, _dense(**tensors)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ROWS)
def test_skip_of_each_element(backend, dtype):
    """Apart from the suite, for without its last axis this D is a good one, not a wrong one."""
    setting = Setting("packed", h0=True, reverse=True, lengths=LENGTHS)
    call = CASE.call(ELEMENTWISE, SIZE, setting).cast(dtype)
    standard = Standard.of(call)
    standard.judge(call.differentiate(backend, standard.cotangents), CASE, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ROWS)
def test_nan_stays_in_its_document(backend, reverse):
    setting = Setting("packed", h0=True, reverse=reverse, lengths=(3, 0, 20, 15))
    call = CASE.call(LAYER, SIZE, setting).cast(widest(backend))
    clean = call.differentiate(backend)
    for name in ("x", "dt", "B", "C"):
        tensor = call.tensors[name].clone()
        tensor[0, 10] = torch.nan
        dirty = call.replace(**{name: tensor}).differentiate(backend)
        assert dirty["y"][:, 10].isnan().all()
        for output in ("y", "dx", "ddt", "dB", "dC"):
            assert same_bits(dirty[output][:, :3], clean[output][:, :3]), output
            assert same_bits(dirty[output][:, 23:], clean[output][:, 23:]), output
        for output in ("h", "dh0"):
            assert same_bits(dirty[output][[0, 1, 3]], clean[output][[0, 1, 3]]), output


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on")
@pytest.mark.parametrize(
    "setting", [Setting("h0", h0=True), Setting("packed", h0=True, reverse=True, lengths=(40, 60))]
)
def test_segments_and_parts_of_the_batch_and_of_the_heads(setting, monkeypatch):
    """Each chunk its own segment, each batch row its own part, each head its own sum."""
    from ssmscan.ops.ssd import configs, kernel_bwd

    monkeypatch.setattr(configs, "SHORTEST", 1)
    monkeypatch.setattr(configs, "PROGRAMS", 1 << 20)
    monkeypatch.setattr(kernel_bwd, "STATES_BYTES", 0)
    call = CASE.call(LAYER, {**SIZE, "l": 50}, setting).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on")
@pytest.mark.parametrize("option", [*CASE.options, ELEMENTWISE])
@pytest.mark.parametrize("reverse", [False, True])
def test_whole_tiles(option, reverse):
    """Lengths, channels and states that fill every tile, of which kernels mask nothing; the suite's sizes never do."""
    call = CASE.call(option, WHOLE, Setting("h0", h0=True, reverse=reverse)).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@pytest.mark.parametrize("setting", [Setting("h0", h0=True), Setting("packed", h0=True, lengths=(9, 90, 0, 51))])
def test_levels_of_chunks(setting, monkeypatch):
    """The torch backend with so small chunks that states are carried over chunks of them."""
    monkeypatch.setattr(plain, "CHUNK", 4)
    call = CASE.call(LAYER, {**SIZE, "l": 150}, setting)
    assert_close(call.differentiate("torch"), call.differentiate("reference"), torch.float64)


@torch.no_grad()
def test_compiled_for_one_token_and_for_several():
    """The number of heads is a variable to the compiler then, beside a D whose length it knows."""
    compiled = torch.compile(ssd_step, backend="eager", fullgraph=True)
    call = CASE.call(LAYER, SIZE).cast(torch.float32)
    h = torch.zeros(SIZE["b"], SIZE["h"], SIZE["p"], SIZE["n"])
    other = h.clone()
    for some in (call.each(lambda tensor: tensor[:, 0]), call.each(lambda tensor: tensor[:, :3])):
        y = compiled(**some.tensors, **some.keywords, h=h)
        assert_close({"y": y}, {"y": ssd_step(**some.tensors, **some.keywords, h=other)}, torch.float32)
