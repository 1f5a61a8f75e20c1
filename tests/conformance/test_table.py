"""The table in tests/README.md is what stands in the tree; ``python tests/suite_table.py`` writes it."""

from pathlib import Path

import pytest
import torch

from ssmscan import backend as available
from ssmscan.ops.cases import CASES
from suite_table import DTYPES, README, insert, kinds


def test_readme(collected):
    if not collected.files.issuperset(Path(__file__).parent.glob("test_*.py")):
        pytest.skip("only a part of the suite was collected")
    if any(available.why_not(backend, "cpu", torch.float32) for backend in ("cpu", "triton")):
        pytest.skip("not all backends run on this machine's CPU")
    missing = [
        (case.name, backend, dtype)
        for case in CASES
        for backend in case.backends
        for dtype in DTYPES
        if (backend, dtype) != ("triton", "float64") and not collected.counts[case.name, backend, dtype, "quick"]
    ]
    assert not missing, f"nothing quick runs {missing}"
    text = README.read_text(encoding="utf-8")
    assert insert(text, kinds(collected.counts)) == text, "run python tests/suite_table.py"
