"""Write the results into README.md and docs/benchmarks.md, and draw docs/images/<op>-<gpu>.png."""

from pathlib import Path

from ssmscan.bench.report import insert, plot, tables
from ssmscan.bench.result import read_all

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    results = read_all(root / "benchmarks" / "results")
    for name, headlines in (("README.md", True), ("docs/benchmarks.md", False)):
        page = root / name
        page.write_text(insert(page.read_text(encoding="utf-8"), tables(results, headlines)), encoding="utf-8")
    for result in results:
        plot(result, root / "docs" / "images" / f"{result.op}-{result.gpu}.png")
