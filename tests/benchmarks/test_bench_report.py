"""Records written and read, and shown in a terminal."""

import importlib.util
import json

import pytest
from bench_records import RECORD, read

from ssmscan.bench import report


def test_round_trip(tmp_path):
    path = read(tmp_path).write(tmp_path / "new")
    assert path == tmp_path / "new" / "h200" / "linear_scan.json"
    assert json.loads(path.read_text(encoding="utf-8")) == RECORD


@pytest.mark.parametrize("rich", [True, False])
def test_show(rich, tmp_path, capsys, monkeypatch):
    if not rich:
        monkeypatch.setattr(report, "find_spec", lambda name: None)
    elif importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    report.show(read(tmp_path))
    out = capsys.readouterr().out
    assert out.startswith("linear_scan on h200: 2026-01-02")
    assert "fwd 30 µs, fwdbwd 242 µs" in out
    assert out.count("b=8 l=8192 d=2048") == 3
    assert "0.3251" in out
