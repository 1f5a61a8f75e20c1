"""The table and the picture of what several GPUs recorded, from rows made by hand, and those in the tree."""

from pathlib import Path

import pytest

from ssmscan.bench import pages, scaling
from ssmscan.bench.result import read_rows

ROOT = Path(__file__).parents[2]
SOURCE = {"commit": "abc", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00"}
LINKS = {
    "experiment": "links", "case": "", "gpus": 4, "mesh": None, "batch": None, "length": None, "chunk": None,
    "checkpointing": None, "weights": None, "graph": None, "copy_gbps": 3006, "all_reduce_ms": 4.8,
    "all_reduce_gbps": 335.5, "all_reduce_4k_ms": 0.021, **SOURCE,
}  # fmt: skip


def _row(gpus, length, rate, **changes):
    return {
        "experiment": "scan", "case": "ssd", "gpus": gpus, "mesh": f"cp={gpus}", "batch": 1, "length": length,
        "chunk": None, "checkpointing": None, "weights": None, "graph": None, "ms": 1e3 * length / rate,
        "tokens_per_s": rate, "collectives": 2, "sent_bytes": 2_400_000, "peak_gib": 3.25, **SOURCE, **changes,
    }  # fmt: skip


ROWS = [
    LINKS,
    _row(4, 262144, 36_000_000),
    _row(1, 65536, 10_000_000, mesh="", sent_bytes=0),
    _row(2, 131072, 19_000_000),
    _row(1, 1048576, 9_000_000, mesh=""),
    _row(1, 1048576, 8_000_000, mesh="", chunk=65536),
    _row(4, 1048576, 28_800_000),
    _row(4, 2048, 500_000, experiment="model", case="mamba2-1.3b", mesh="dp=4", batch=32, checkpointing=True),
    _row(4, 2048, 600_000, experiment="model", case="mamba2-1.3b", mesh="dp=4", batch=32, weights="gathered"),
    _row(4, 2048, 700_000, experiment="model", case="mamba2-1.3b", mesh="dp=4", batch=32, weights="copies", graph=True),
]


def test_efficiency():
    """Of the GPU that had as many tokens as each, else of the one that had as many as all."""
    assert scaling.efficiency(ROWS[1], ROWS[1:]) == (0.9, "each")
    assert scaling.efficiency(ROWS[3], ROWS[1:]) == (0.95, "each")
    assert scaling.efficiency(ROWS[6], ROWS[1:]) == (0.8, "all")
    assert scaling.efficiency(ROWS[2], ROWS[1:]) is None
    assert scaling.efficiency(ROWS[7], ROWS[1:]) is None


def test_page():
    text = scaling.page({"h100x4": ROWS})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2] == "| `ssd` |  | 1 | 64k |  | 6.6 ms | 10,000,000 |  | 3.2 GiB |  |"
    assert "| `ssd` | cp=4 | 4 | 256k |  | 7.3 ms | 36,000,000 | 0.90 (as many for each) | 3.2 GiB | 2.4 MB |" in lines
    assert "| `mamba2-1.3b`, checkpointing | dp=4 | 4 | 32 × 2k |  | 4.1 ms | 500,000 |  | 3.2 GiB | 2.4 MB |" in lines
    assert "| `mamba2-1.3b`, weights sent once | dp=4 | 4 | 32 × 2k |  | 3.4 ms |" in text
    assert "| `mamba2-1.3b`, whole weights, CUDA graph | dp=4 | 4 | 32 × 2k |  | 2.9 ms |" in text
    assert len(lines) == 2 + 9
    assert "On 4 GPUs a copy within one moves 3,006 GB/s, an all-reduce of a gigabyte 335.5 GB/s" in text
    assert "one of 4 KiB takes 21 µs." in text
    assert "2026-01-02, commit abc, torch 2.11.0." in text
    assert text.endswith("![Several GPUs of h100x4](images/scaling-h100x4.png)")


def test_of_nothing():
    assert scaling.page({}) == "Not measured yet."


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "images" / "scaling.png"
    scaling.picture("h100x4", ROWS, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_what_is_recorded():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    content = scaling.page(read_rows(ROOT / "benchmarks" / "results", "distributed"))
    assert pages.insert(text, content) == text, "run benchmarks/report.py"
