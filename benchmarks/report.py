"""Write the results into README.md and draw docs/images/<op>-<gpu>.png: ``python benchmarks/report.py``."""

from pathlib import Path

from ssmscan.bench.report import insert, plot, tables
from ssmscan.bench.result import read_all

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    results = read_all(root / "benchmarks" / "results")
    readme = root / "README.md"
    readme.write_text(insert(readme.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    for result in results:
        plot(result, root / "docs" / "images" / f"{result.op}-{result.gpu}.png")
