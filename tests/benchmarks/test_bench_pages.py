"""Tables and pictures of records made by hand, and those in the tree."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_records import RECORD, ROW, read

from ssmscan.bench import pages, plot
from ssmscan.bench.compare import Other, headlines, machine_of, pairs, read_others
from ssmscan.bench.result import read_all, read_rows

ROOT = Path(__file__).parents[2]
OTHER = Other("linear_scan", ROW["shape"], "headline", "fwd", "quick", 0.6502, "one run")
QUICK = [OTHER, replace(OTHER, direction="fwdbwd", ms=3.0)]
SLOW = [replace(OTHER, name="slow", ms=0.2), replace(OTHER, name="slow", direction="fwdbwd", ms=9.0)]
MODEL = {
    "model": "mamba2-130m", "direction": "train", "batch": 8, "length": 2048, "mode": "eager",
    "tokens_per_s": 153000, "step_ms": 107.0, "host_ms": 102.0, "peak_gib": 12.34,
    "commit": "abc", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


@pytest.fixture
def result(tmp_path):
    return read(tmp_path)


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_short(result):
    text = pages.short([result], {"h200": QUICK})
    assert rows_of(text) == [
        "| operation | shape | forward | forward + backward | × floor | × as fast as the best public kernel | which |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        "| `linear_scan` | b=8 l=8192 d=2048 | 0.325 ms | 1.00 ms | 1.03 / 1.03 | 2.00 / 3.00 | quick |",
    ]
    assert "One H200; 2026-01-02, commit abc; torch 2.11.0, triton 3.6.0; bfloat16." in text
    assert "one run" in text
    assert "docs/images/headlines-h200.png" in text


def test_short_without_others(result):
    assert rows_of(pages.short([result], {}))[0] == "| operation | shape | forward | forward + backward | × floor |"


def test_full(result):
    text = pages.full([result], {"h200": QUICK}, {"h200": [MODEL]}, {})
    assert rows_of(text)[:5] == [
        "| operation | shape | dtype | direction | time | floor | time / floor | memory |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| `linear_scan` | b=8 l=8192 d=2048 | bfloat16 | forward | 0.325 ms | 0.314 ms | 1.03 | 256 MiB |",
        "| `linear_scan` | b=8 l=8192 d=2048 | bfloat16 | forward + backward | 1.00 ms | 0.314 ms | 1.03 | 256 MiB |",
        '| `linear_scan` (x and a; backend="torch") | b=8 l=8192 d=2048 | bfloat16 | forward | 54.9 ms | 0.314 ms '
        "| 1.03 | 256 MiB |",
    ]
    assert "- linear_scan: 2026-01-02, commit abc, torch 2.11.0, triton 3.6.0, copy limit 4270 GB/s." in text
    assert "| `linear_scan` | 30 | 242 | 32 | 210 | 0.9 / 1.2 |" in text
    assert "2.00 / 3.00 | quick |" in text
    assert (
        "| mamba2-130m | training | 8 × 2048 | eager | 153,000 | 107 ms | 102 ms | 12.3 GiB | 2026-01-02, abc |" in text
    )


def test_the_best_of_the_others_is_one_of_them(result):
    (pair,) = pairs([result], SLOW + QUICK)
    assert {other.name for other in pair.best.values()} == {"quick"}


def test_others_are_compared_at_their_own_work(result):
    elsewhere = [replace(other, shape={**ROW["shape"], "l": 4096}) for other in QUICK]
    assert not pairs([result], elsewhere)[0].best


def test_headlines_have_a_line_more_where_others_do_something_else(tmp_path):
    rows = [*RECORD["rows"], {**ROW, "variant": "x and a"}, {**ROW, "variant": "x and a", "direction": "fwdbwd"}]
    found = pairs([read(tmp_path, {**RECORD, "rows": rows})], [replace(other, variant="x and a") for other in QUICK])
    assert [pair.row.variant for pair in headlines(found)] == ["headline", "x and a"]
    # The first of several backends is ours, at all benchmarks.
    assert found[1].row.backend == "torch"


def test_the_machine_with_the_most_operations_is_shown(result):
    second = replace(result, gpu="h100", rows=tuple(replace(row, op="ssd") for row in result.rows))
    both = [result, replace(result, gpu="h100"), second]
    cpu = [replace(both[i % 3], gpu="cpu") for i in range(6)]
    assert machine_of(both + cpu, {}) == "h100"
    assert machine_of(both[:2] + cpu, {"h100": QUICK}) == "h100"
    assert machine_of(both[:2] + cpu, {"h200": QUICK}) == "h200"
    assert machine_of(cpu, {}) == "cpu"


@pytest.mark.parametrize(
    ("value", "digits"), [(0.00164, "0.00164"), (0.54, "0.540"), (91.56, "91.6"), (1920.4, "1920")]
)
def test_three_digits(value, digits):
    assert pages.digits(value) == digits


def test_insert_replaces_what_stood_there():
    text = f"# A\n\n{pages.BEGIN}\nold\n{pages.END}\n\nend\n"
    once = pages.insert(text, "new")
    assert once == f"# A\n\n{pages.BEGIN}\nnew\n{pages.END}\n\nend\n"
    assert pages.insert(once, "new") == once


@pytest.mark.parametrize("text", ["", pages.BEGIN, f"{pages.END}{pages.BEGIN}"])
def test_insert_needs_both_markers(text):
    with pytest.raises(ValueError, match=r"^insert: text must hold"):
        pages.insert(text, "new")


def test_plots(result, tmp_path):
    pytest.importorskip("matplotlib")
    length, floor = tmp_path / "images" / "length.png", tmp_path / "images" / "floor.png"
    plot.over_length(result, length)
    plot.over_floor(pairs([result], QUICK), "h200", floor)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (length, floor))


def test_readme_and_the_benchmarks_page_show_what_is_recorded():
    folder = ROOT / "benchmarks" / "results"
    results, others = read_all(folder), read_others(folder)
    models, figures = read_rows(folder, "models"), read_rows(folder, "figures")
    for name, content in (
        ("README.md", pages.short(results, others)),
        ("docs/benchmarks.md", pages.full(results, others, models, figures)),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert pages.insert(text, content) == text, "run benchmarks/report.py"
    assert all(other.op in {result.op for result in results} for other in others["h200"])
