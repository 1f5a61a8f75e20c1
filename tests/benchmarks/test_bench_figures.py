"""Pictures and tables of whole models and of the papers' figures, from rows made by hand."""

import pytest
from bench_records import read

from ssmscan.bench import figures, pages

ORIGIN = {"commit": "abc", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00"}
GENERATED = {
    "model": "mamba2-130m", "direction": "generate", "batch": 64, "length": 512, "new_tokens": 128, "mode": "graph",
    "tokens_per_s": 45678, "call_tokens_per_s": 40123, "prefill_ms": 31.5, "step_ms": 1.401, "host_ms": 0.052,
    "peak_gib": 2.5, **ORIGIN,
}  # fmt: skip
FULL = {key: GENERATED[key] for key in ("direction", "length", "new_tokens", "mode", *ORIGIN)} | {
    "model": "transformer-130m", "batch": 256, "left_out": "out of memory",
}  # fmt: skip
PREFILL = {
    "model": "mamba2-130m", "direction": "prefill", "batch": 8, "length": 2048, "mode": "eager",
    "tokens_per_s": 1234567, "step_ms": 13.25, "host_ms": 9.0, "peak_gib": 1.25, **ORIGIN,
}  # fmt: skip


def _operations(figure, lines):
    """Rows at 256 and 512 tokens; a time of None is a row that does not fit."""
    return [
        {"figure": figure, "line": line, "direction": direction, "batch": 4, "length": length}
        | ({"left_out": "out of memory"} if ms is None else {"ms": ms * length})
        for direction in ("fwd", "fwdbwd")
        for line, times in lines.items()
        for length, ms in zip((256, 512), times, strict=True)
    ]


def _models(figure, batch, length, model="transformer-1.3b", **measured):
    about = {"figure": figure, "line": model, "direction": "train", "batch": batch, "length": length, "new_tokens": 8}
    return about | measured


ROWS = [
    *_operations("scan_length", {"selective_scan": (1, 1), "attention": (3, 6), "convolution": (None, None)}),
    *_operations("naive", {"loop": (100, None), "torch": (None, None), "selective_scan": (1, 1)}),
    _models("inference_batch", 1, 2048, call_tokens_per_s=100),
    _models("inference_batch", 2, 2048, left_out="out of memory, as was a batch of 2"),
    _models("inference_batch", 1, 2048, model="mamba2attn-2.7b", call_tokens_per_s=50),
    _models("train_length", 2, 2048, model="mamba-130m", tokens_per_s=1e5, peak_gib=7.0),
    _models("train_length", 1, 4096, model="mamba-130m", tokens_per_s=1e5, peak_gib=None),
]


def test_every_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    paths = figures.draw_all(ROWS, "h200", tmp_path)
    assert [path.name for path in paths] == [f"{name}-h200.png" for name in figures.FIGURES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert figures.draw_all([], "h200", tmp_path) == []


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """The planes of a picture, by its name."""
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(figures, "save", lambda picture, title, path: saved.append((picture, title)))

    def of(name):
        figures.draw(name, ROWS, "h200", tmp_path)
        picture, title = saved.pop()
        return picture.axes, title

    return of


def test_lines_and_how_much_longer_they_take(panels):
    (forward, both), title = panels("scan_length")
    assert title == "Batch 4, 1024 channels, bfloat16, on H200"
    for plane in (forward, both):
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in plane.get_lines()}
        assert lines["selective_scan"] == [(256, 256), (512, 512)]
        assert lines["attention"] == [(256, 768), (512, 3072)]
        # Nothing was measured of it.
        assert "FFT convolution" not in lines
        assert [text.get_text() for text in plane.texts] == ["6×"]


def test_what_does_not_fit_is_marked(panels):
    # One plane, for nothing smaller was measured.
    (large,), title = panels("inference_batch")
    assert title == "Generating 8 tokens after 2048, on H200"
    marks = [line for line in large.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(2, 100)]
    assert {"Transformer", "mamba2attn-2.7b", "out of memory"} <= {line.get_label() for line in large.get_lines()}


def test_rate_and_memory(panels):
    (rate, memory), title = panels("train_length")
    assert title == "Training, 4k tokens in every step, on H200"
    assert [list(line.get_ydata()) for line in rate.get_lines()] == [[1e5, 1e5]]
    assert [list(line.get_ydata()) for line in memory.get_lines()] == [[7.0]]


def test_tables(tmp_path):
    text = pages.full([read(tmp_path)], {}, {"h200": [FULL, GENERATED, PREFILL]}, {"h200": ROWS})
    lines = text.splitlines()
    steps = "| mamba2-130m | reading a prompt | 8 × 2048 | eager | 1,234,567 | 13.2 ms | 9.00 ms | 1.2 GiB |"
    assert f"{steps} 2026-01-02, abc |" in lines
    generated = lines.index("### Generating on H200")
    rows = [line for line in lines[generated:] if line.startswith(("| mamba2", "| transformer"))]
    assert rows == [
        "| mamba2-130m | 64 | 512 + 128 | 45,678 | 40,123 | 1.40 ms | 0.0520 ms | 31.5 ms | 2.5 GiB "
        "| 2026-01-02, abc |",
        "| transformer-130m | 256 | 512 + 128 | out of memory | – | – | – | – | – | 2026-01-02, abc |",
    ]
    assert all(f"![{name}](images/{name}-h200.png)" in lines for name in figures.FIGURES)
