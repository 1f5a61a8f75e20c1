"""Run benchmarks from any folder and record them in this repository: ``python benchmarks/run.py linear_scan``."""

import sys
from pathlib import Path

from ssmscan.bench.__main__ import main

if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    sys.exit(main(["--out", str(results), *sys.argv[1:]], prog="benchmarks/run.py"))
