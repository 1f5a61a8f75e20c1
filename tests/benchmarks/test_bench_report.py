"""Tables and plots from records made by hand."""

import importlib.util
import json

import pytest

from ssmscan.bench import report
from ssmscan.bench.result import Result

ROW = {
    "op": "linear_scan",
    "shape": {"b": 8, "l": 8192, "d": 2048},
    "dtype": "bfloat16",
    "direction": "fwd",
    "backend": "triton",
    "variant": "headline",
    "median_ms": 0.3251,
    "p20_ms": 0.324,
    "p80_ms": 0.327,
    "floor_ms": 0.314,
    "ratio_to_floor": 1.035,
    "peak_mib": 256.0,
}
SWEPT = {**ROW, "shape": {"b": 4, "l": 16384, "d": 2048}, "variant": "length sweep"}
RECORD = {
    "gpu": "h200",
    "commit": "abc",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-01-02T03:04:05+00:00",
    "copy_gbps": 4270.0,
    "host_us": {"fwd": 30.1, "fwdbwd": 242.3, "sdpa fwd": 31.8, "sdpa fwdbwd": 209.7},
    "rows": [
        ROW,
        {**ROW, "direction": "fwdbwd", "median_ms": 1.0},
        {**ROW, "backend": "torch", "median_ms": 54.9, "variant": "x and a"},
        SWEPT,
        {**SWEPT, "direction": "fwdbwd"},
    ],
}


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "linear_scan.json"
    path.write_text(json.dumps(RECORD), encoding="utf-8")
    return Result.read(path)


def test_round_trip(result, tmp_path):
    path = result.write(tmp_path / "new")
    assert path == tmp_path / "new" / "h200" / "linear_scan.json"
    assert json.loads(path.read_text(encoding="utf-8")) == RECORD


def test_tables(result):
    lines = report.tables([result]).splitlines()
    assert lines[0].startswith("**H200**")
    assert [line for line in lines if line.startswith("|")] == [
        "| operation | shape | dtype | direction | time | floor | time / floor | memory |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| `linear_scan` | b=8 l=8192 d=2048 | bfloat16 | forward | 0.325 ms | 0.314 ms | 1.03 | 256 MiB |",
        "| `linear_scan` | b=8 l=8192 d=2048 | bfloat16 | forward + backward | 1 ms | 0.314 ms | 1.03 | 256 MiB |",
        '| `linear_scan` (x and a; backend="torch") | b=8 l=8192 d=2048 | bfloat16 | forward | 54.9 ms | 0.314 ms '
        "| 1.03 | 256 MiB |",
    ]
    assert "2026-01-02, commit abc, torch 2.11.0, triton 3.6.0, copy limit 4270 GB/s" in lines[-1]
    headlines = report.tables([result], headlines=True).splitlines()
    assert [line for line in headlines if line.startswith("|")] == [line for line in lines if line.startswith("|")][:4]


def test_insert_replaces_what_stood_there():
    text = f"# A\n\n{report.BEGIN}\nold\n{report.END}\n\nend\n"
    once = report.insert(text, "new")
    assert once == f"# A\n\n{report.BEGIN}\nnew\n{report.END}\n\nend\n"
    assert report.insert(once, "new") == once


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}"])
def test_insert_needs_both_markers(text):
    with pytest.raises(ValueError, match=r"^insert: text must hold"):
        report.insert(text, "new")


@pytest.mark.parametrize("rich", [True, False])
def test_show(result, rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setattr(report, "find_spec", lambda name: None)
    elif importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    report.show(result)
    out = capsys.readouterr().out
    assert out.startswith("linear_scan on h200: 2026-01-02")
    assert out.count("b=8 l=8192 d=2048") == 3
    assert "0.3251" in out


def test_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "images" / "linear_scan-h200.png"
    report.plot(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
