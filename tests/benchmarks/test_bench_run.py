"""The runner on a tiny case: what it records, and that it refuses to time what is wrong."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from ssmscan.bench import __main__ as command
from ssmscan.bench import gate, measure, result, run
from ssmscan.ops.linear_scan.case import ALL, DECAY
from ssmscan.ops.linear_scan.case import CASE as LINEAR_SCAN
from ssmscan.testing import Benchmark

SIZE = {"b": 2, "l": 40, "d": 3}
CASE = replace(
    LINEAR_SCAN,
    benchmarks=(
        Benchmark("headline", SIZE, ALL, torch.float32),
        Benchmark("x and a", SIZE, DECAY),
        Benchmark("launches", SIZE, ALL, graph=True),
        Benchmark("on a CPU", SIZE, ALL, torch.float32, device="cpu"),
        Benchmark("x and a", SIZE, DECAY, device="cpu"),
    ),
)


def _wrong(change):
    """linear_scan, whose Numba backend returns ``change(y)``."""

    def op(x, a=None, b=None, c=None, *, backend="auto", **keywords):
        y, h = LINEAR_SCAN.op(x, a, b, c, backend=backend, **keywords)
        return (change(y) if backend == "cpu" else y), h

    return replace(CASE, op=op)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.001)
    monkeypatch.setattr(measure, "WARM_UP", {"cuda": 0.0, "cpu": 0.0})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cuda": 2**20, "cpu": 2**20})


def test_record(tmp_path, capsys):
    assert run.run_cases([CASE], tmp_path, "cpu", ("cpu", "torch"), source="abc")
    path = tmp_path / "cpu" / "linear_scan.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert list(record) == ["gpu", "commit", "torch", "triton", "date", "copy_gbps", "host_us", "rows"]
    assert record["gpu"] == "cpu"
    assert record["commit"] == "abc"
    assert record["torch"] == torch.__version__
    assert record["host_us"] is None
    assert [(r["variant"], r["backend"], r["direction"], r["dtype"]) for r in record["rows"]] == [
        (variant, backend, direction, dtype)
        for variant, dtype in (("headline", "float32"), ("x and a", "bfloat16"))
        for backend in ("cpu", "torch")
        for direction in ("fwd", "fwdbwd")
    ]
    for row in record["rows"]:
        assert list(row) == list(result.Row.__dataclass_fields__)
        assert row["shape"] == SIZE
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio_to_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"], rel=1e-2)
        assert row["peak_mib"] is None
    headline, both = record["rows"][:2]
    # x, a, b, c and y; then those and dy read, and four gradients written.
    assert headline["floor_ms"] == pytest.approx(5 * 2 * 40 * 3 * 4 / record["copy_gbps"] / 1e6, rel=1e-2)
    assert both["floor_ms"] == pytest.approx(14 / 5 * headline["floor_ms"], rel=1e-2)
    assert str(path) in capsys.readouterr().out
    assert result.read_all(tmp_path)[0].op == "linear_scan"


def test_wrong_results_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "CASES", (_wrong(lambda y: 1.1 * y),))
    assert command.main(["linear_scan", "--device", "cpu", "--backends", "cpu", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "linear_scan, headline" in capsys.readouterr().err


def test_one_wrong_row_keeps_the_operation_from_the_record(tmp_path):
    case = _wrong(lambda y: y if y.dtype is torch.float32 else 1.1 * y)
    assert not run.run_cases([case], tmp_path, "cpu", ("cpu",), source="abc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [(slice(None), slice(-9, None)), (-1, slice(None), -1)])
def test_full_size_check(place):
    """It sees what is wrong in the last row and channels, and passes what is right."""
    benchmark = Benchmark("headline", {"b": 2, "l": 64, "d": 200}, ALL, torch.float32)
    keep = torch.ones(2, 64, 200)
    keep[place] = 0
    for change, wrong in ((lambda y: y, False), (lambda y: y * keep, True)):
        call = run.draw(_wrong(change), benchmark, "cpu")
        dy = torch.randn(2, 64, 200, generator=torch.Generator().manual_seed(0))
        if wrong:
            with pytest.raises(AssertionError, match="y"):
                gate.check_full(benchmark, "cpu", call, dy)
        else:
            gate.check_full(benchmark, "cpu", call, dy)


def test_sizes():
    size = {"b": 8, "l": 8192, "d": 2048}
    rows = run.benchmarks_of(replace(CASE, benchmarks=(Benchmark("first", size, ALL), CASE.benchmarks[2])), "cuda")
    assert [row.variant for row in rows] == ["headline", "launches"] + [result.STEP] * 2 + ["length sweep"] * 6
    assert [(row.size["b"], row.size["l"]) for row in rows[2:4]] == [(1, 1), (64, 1)]
    assert [row.size["l"] for row in rows[4:]] == [1024, 2048, 4096, 16384, 32768, 65536]
    assert {row.size["b"] * row.size["l"] for row in rows[4:]} == {65536}
    here = Benchmark("here", {"b": 2, "l": 2048, "d": 64}, ALL, device="cpu")
    rows = run.benchmarks_of(replace(CASE, benchmarks=(Benchmark("first", size, ALL), here)), "cpu")
    assert [(row.variant, row.size["b"], row.size["l"]) for row in rows] == [
        ("headline", 2, 2048),
        ("length sweep", 4, 1024),
        ("length sweep", 1, 4096),
    ]
    assert run.benchmarks_of(replace(CASE, benchmarks=()), "cuda") == []


def test_drawn_rows_differ(monkeypatch):
    monkeypatch.setattr(run, "TOKENS", 7)
    tensors = run.draw(CASE, CASE.benchmarks[1], "cpu").tensors
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "x": ((2, 40, 3), torch.bfloat16),
        "a": ((2, 40, 3), torch.bfloat16),
    }
    x = tensors["x"].flatten(0, 1)
    assert torch.equal(x[7:], x[:-7])
    assert not torch.equal(tensors["x"][0], tensors["x"][1])


def test_a_sweep_is_drawn_once(monkeypatch):
    """Its rows have the same tokens, cut into sequences of other lengths."""
    monkeypatch.setattr(run, "TOKENS", 7)
    drawn = []

    def inputs(size, generator):
        drawn.append(size)
        return CASE.inputs(size, generator)

    case = replace(CASE, inputs=inputs)
    rows = [Benchmark("length sweep", {"b": b, "l": l, "d": 3}, ALL, torch.float32) for b, l in ((4, 5), (2, 10))]
    short, long = (run.draw(case, row, "cpu").tensors["x"] for row in rows)
    assert len(drawn) == 1
    assert torch.equal(short.flatten(0, 1), long.flatten(0, 1))


def test_arithmetic_floor():
    case = replace(CASE, floor_ms=lambda size, direction: 5.0)
    assert run._arithmetic_ms(case, case.benchmarks[0], "fwd", "cuda") == 5.0
    assert run._arithmetic_ms(case, case.benchmarks[0], "fwd", "cpu") == 0.0
    assert run._arithmetic_ms(CASE, case.benchmarks[0], "fwd", "cuda") == 0.0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_machine_names(name, short, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert result.machine("cuda") == short
    assert result.machine("cpu") == "cpu"


def test_commit(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", result.commit())
    monkeypatch.setenv("PATH", "")
    assert result.commit() == "unknown"


@pytest.mark.parametrize(
    "arguments", [["no_such_op"], ["linear_scan", "--backends", "fast"], ["--device", "tpu"], ["--repeat", "3"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.gpu
def test_device_rows(tmp_path):
    assert run.run_cases([CASE], tmp_path, "cuda", ("triton", "torch"), source="abc")
    (record,) = result.read_all(tmp_path)
    assert record.host_us is not None
    assert {row.variant for row in record.rows} == {"headline", "x and a", "launches", result.STEP}
    assert all(row.median_ms > 0 and row.peak_mib is not None and row.peak_mib > 0 for row in record.rows)


def test_rows_of_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "h200" / "models.json"
    old = [{"model": "a", "ms": 1}, {"model": "b", "ms": 2}]
    assert result.replace_rows(path, old, ["model"]) == old
    kept = [{"model": "b", "ms": 2}, {"model": "a", "ms": 3}]
    assert result.replace_rows(path, [{"model": "a", "ms": 3}], ["model"]) == kept == json.loads(path.read_text())


def test_rows_of_several_writers_stay(tmp_path):
    """As of processes that share the GPUs of a machine."""
    path = tmp_path / "h200" / "figures.json"
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda i: result.replace_rows(path, [{"line": i}], ["line"]), range(64)))
    assert sorted(row["line"] for row in json.loads(path.read_text(encoding="utf-8"))) == list(range(64))
