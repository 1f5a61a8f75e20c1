"""What the conformance suite does not say of ssd_bidirectional: its matrix, its relation to ssd, D by element, NaN."""

import pytest
import torch

from ssmscan import backend as available
from ssmscan import ssd, ssd_bidirectional
from ssmscan.ops.ssd.bidirectional.case import CASE, HYDRA, SHARED
from ssmscan.ops.ssd.case import ELEMENTWISE
from ssmscan.testing import Setting, Standard, assert_close, rms_ratio, same_bits, widest

SIZE = {"b": 2, "l": 37, "h": 4, "p": 3, "g": 2, "n": 5}
BACKENDS = [name for name in CASE.backends if available.why_not(name, "cpu", torch.float32) is None]
ROWS = [pytest.param(name, marks=[pytest.mark.slow] if name == "triton" else []) for name in BACKENDS]
PLAIN = [name for name in ("reference", *BACKENDS) if name != "triton"]


def _triangle(dt, A, B, C, shift):
    """M_ij = exp(log-decays from j+1 to i)·(C_i·B_j)·dt_j for j <= i, no recurrence; (b, h, i, j).

    With ``shift`` row i is that of i - 1, and the first is 0: what lies below the diagonal.
    """
    per_group = dt.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(per_group, 2) for v in (B, C))
    i = torch.arange(dt.shape[1])
    between = (i[:, None, None] >= i) & (i > i[:, None])  # i, j, k: j < k <= i
    decay = torch.einsum("ijk,bkh->bhij", between.double(), dt * A).exp()
    M = torch.where(i[:, None] >= i, decay, 0) * torch.einsum("bihn,bjhn,bjh->bhij", C, B, dt)
    return torch.nn.functional.pad(M, (0, 0, 1, 0))[..., :-1, :] if shift else M


def _matrix(x, dt, A, B, C, D, dt_rev, B_rev, C_rev, shift):
    """The dense matrix of both forms, (b, h, i, j)."""
    lower = _triangle(dt, A, B, C, shift)
    upper = _triangle(dt_rev.flip(1), A, B_rev.flip(1), C_rev.flip(1), shift).flip(2, 3)
    return lower + upper + torch.diag_embed(D[:, None].expand(-1, x.shape[1]))


# Around a chunk of the torch backend and two; the interpreter's chunks are of 16.
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("backend", PLAIN)
def test_dense_matrix(backend, shift, length):
    tensors = CASE.draw({**SIZE, "l": length}, HYDRA)
    del tensors["z"], tensors["dt_bias"]
    tensors |= {name: tensors[name].abs() / 4 for name in ("dt", "dt_rev")}
    y = ssd_bidirectional(**tensors, shift=shift, backend=backend)
    assert rms_ratio(y, torch.einsum("bhij,bjhp->bihp", _matrix(**tensors, shift=shift), tensors["x"])) < 1e-12


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on")
@pytest.mark.parametrize("length", [1, 16, 17, 33])
@pytest.mark.parametrize("shift", [False, True])
def test_dense_matrix_on_triton(shift, length):
    tensors = CASE.draw({**SIZE, "b": 1, "l": length, "h": 2}, HYDRA)
    del tensors["z"], tensors["dt_bias"]
    tensors |= {name: tensors[name].abs() / 4 for name in ("dt", "dt_rev")}
    expected = torch.einsum("bhij,bjhp->bihp", _matrix(**tensors, shift=shift), tensors["x"])
    y = ssd_bidirectional(**CASE.cast(tensors, torch.float32), shift=shift, backend="triton")
    assert rms_ratio(y, expected) < 1e-5


@pytest.mark.parametrize("shift", [False, True])
def test_diagonal(shift):
    """How a token meets itself: in both scans and D, or in D alone."""
    tensors = CASE.draw({**SIZE, "l": 1}, HYDRA)
    del tensors["z"], tensors["dt_bias"]
    x, D = tensors["x"], tensors["D"]
    alone = D[:, None] * x
    if not shift:
        for end in ("", "_rev"):
            dt, B, C = (tensors[name + end] for name in ("dt", "B", "C"))
            alone = alone + ssd(x, dt, tensors["A"], B, C)[0]
    assert_close({"y": ssd_bidirectional(**tensors, shift=shift)}, {"y": alone}, torch.float64)
    if shift:
        assert ssd_bidirectional(**{**tensors, "D": None}, shift=True).count_nonzero() == 0


@pytest.mark.parametrize("backend", PLAIN)
def test_the_same_from_the_other_end(backend):
    """Flipped, with the directions exchanged, the output is flipped, and so are the gradients."""
    call = CASE.call(HYDRA, SIZE)
    tensors = dict(call.tensors)
    for name in ("dt", "B", "C"):
        tensors[name], tensors[f"{name}_rev"] = tensors[f"{name}_rev"], tensors[name]
    flipped = call.replace(**tensors).each(lambda tensor: tensor.flip(1))
    cotangent = torch.randn_like(call.tensors["x"])
    values = call.differentiate(backend, {"y": cotangent})
    others = flipped.differentiate(backend, {"y": cotangent.flip(1)})
    for name in ("dt", "B", "C"):
        others[f"d{name}"], others[f"d{name}_rev"] = others[f"d{name}_rev"], others[f"d{name}"]
    moving = {"y", *(f"d{name}" for name in CASE.sequence)}
    assert_close({n: v.flip(1) if n in moving else v for n, v in others.items()}, values, torch.float64)


@pytest.mark.parametrize("setting", [Setting("plain"), Setting("packed", lengths=(0, 1, 15, 17, 3, 12))], ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ROWS)
def test_skip_of_each_element(backend, dtype, shift, setting):
    """Apart from the suite, for without its last axis this D is a good one, not a wrong one."""
    call = CASE.call(ELEMENTWISE, {**SIZE, "l": 48}, setting).set(shift=shift).cast(dtype)
    standard = Standard.of(call)
    standard.judge(call.differentiate(backend, standard.cotangents), CASE, dtype)


@pytest.mark.parametrize("option", [HYDRA, SHARED])
@pytest.mark.parametrize("backend", ROWS)
def test_nan_stays_in_its_document(backend, option):
    call = CASE.call(option, SIZE, Setting("packed", lengths=(3, 0, 20, 15))).cast(widest(backend))
    clean = call.differentiate(backend)
    for name in ("x", "dt", "B", "C"):
        tensor = call.tensors[name].clone()
        tensor[0, 10] = torch.nan
        dirty = call.replace(**{name: tensor}).differentiate(backend)
        assert dirty["y"].isnan().any()
        for output in ("y", "dx", "ddt", "dB", "dC"):
            assert same_bits(dirty[output][:, :3], clean[output][:, :3]), output
            assert same_bits(dirty[output][:, 23:], clean[output][:, 23:]), output


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on")
@pytest.mark.parametrize("option", [*CASE.options, SHARED])
def test_whole_tiles(option):
    """Lengths, channels and states that fill every tile, of which kernels mask nothing; the suite's sizes never do."""
    call = CASE.call(option, {"b": 1, "l": 32, "h": 2, "p": 16, "g": 1, "n": 16}).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on")
@pytest.mark.parametrize("option", [HYDRA, SHARED])
@pytest.mark.parametrize("setting", [Setting("plain"), Setting("packed", lengths=(40, 60))])
@pytest.mark.parametrize("length", [48, 50])
def test_segments_and_parts(option, length, setting, monkeypatch):
    """Each chunk its own segment, each batch row its own part, each head its own sum."""
    from ssmscan.ops.ssd import configs, kernel_bwd

    monkeypatch.setattr(configs, "SHORTEST", 1)
    monkeypatch.setattr(configs, "PROGRAMS", 1 << 20)
    monkeypatch.setattr(kernel_bwd, "STATES_BYTES", 0)
    call = CASE.call(option, {**SIZE, "l": length}, setting).cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), CASE, torch.float32)
