"""Write what is under benchmarks/results into README.md and docs/benchmarks.md, and draw docs/images."""

from pathlib import Path

from ssmscan.bench import figures, pages, plot
from ssmscan.bench.compare import headlines, machine_of, pairs, read_others
from ssmscan.bench.result import read_all, read_rows

ROOT = Path(__file__).parents[1]


def main() -> None:
    recorded, images = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
    results, others = read_all(recorded), read_others(recorded)
    models, drawn = read_rows(recorded, "models"), read_rows(recorded, "figures")
    for name, content in (
        ("README.md", pages.short(results, others)),
        ("docs/benchmarks.md", pages.full(results, others, models, drawn)),
    ):
        page = ROOT / name
        page.write_text(pages.insert(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    for result in results:
        plot.over_length(result, images / f"{result.op}-{result.gpu}.png")
    for gpu, rows in drawn.items():
        figures.draw_all(rows, gpu, images)
    for gpu, rows in read_rows(recorded, "transformers").items():
        plot.speedups(rows, gpu, images / f"patched-{gpu}.png")
    gpu = machine_of(results, others)
    found = headlines(pairs([result for result in results if result.gpu == gpu], others.get(gpu, ())))
    plot.over_floor(found, gpu, images / f"headlines-{gpu}.png")


if __name__ == "__main__":
    main()
