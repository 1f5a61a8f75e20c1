"""What of the conformance suite is quick, slow or for a GPU, by operation, backend and dtype.

``python tests/suite_table.py`` collects the suite, prints the number of tests of each kind, and writes into
tests/README.md which kinds there are.
"""

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
BACKENDS = ("reference", "cpu", "torch", "triton")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("quick", "slow", "gpu")


# Of each operation, backend, dtype (or "any") and kind.
Counts = Counter[tuple[str, str, str, str]]


def count(items: Sequence[pytest.Item]) -> Counts:
    """How many of the tests there are of each kind, before options such as -m take some away."""
    counts: Counts = Counter()
    for item in items:
        taken = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in taken and "backend" in taken:
            kind = next((kind for kind in ("gpu", "slow") if item.get_closest_marker(kind)), "quick")
            dtype = str(taken.get("dtype", "any")).removeprefix("torch.")
            counts[taken["case"].name, taken["backend"], dtype, kind] += 1
    return counts


def insert(text: str, content: str) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def kinds(counts: Counts) -> str:
    """The table in tests/README.md: of each operation and backend the kinds, and of some dtypes alone which."""
    lines = [("operation", *BACKENDS), ("---",) * (1 + len(BACKENDS))]
    for op in _operations(counts):
        lines.append((f"`{op}`", *(", ".join(_kinds(counts, op, backend)) for backend in BACKENDS)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kinds(counts: Counts, op: str, backend: str) -> Iterator[str]:
    run = [dtype for dtype in DTYPES if any(counts[op, backend, dtype, kind] for kind in KINDS)]
    for kind in KINDS:
        dtypes = [dtype for dtype in run if counts[op, backend, dtype, kind]]
        if dtypes:
            yield kind if dtypes == run else f"{kind} ({', '.join(dtypes)})"


def numbers(counts: Counts) -> str:
    """How many tests are quick, slow and for a GPU."""
    lines = [f"{'quick + slow + gpu':<28}" + "".join(f"{dtype:>18}" for dtype in (*DTYPES, "any"))]
    for op in _operations(counts):
        for backend in BACKENDS:
            cells = [" + ".join(str(counts[op, backend, dtype, kind]) for kind in KINDS) for dtype in (*DTYPES, "any")]
            lines.append(f"{op:<18}{backend:<10}" + "".join(f"{cell:>18}" for cell in cells))
    totals = {kind: sum(n for (*_, of), n in counts.items() if of == kind) for kind in KINDS}
    return "\n".join([*lines, ", ".join(f"{n} {kind}" for kind, n in totals.items())])


def _operations(counts: Counts) -> list[str]:
    return sorted({op for op, *_ in counts})


class _Counter:
    """A plugin that counts what is collected."""

    def __init__(self) -> None:
        self.counts: Counts = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.counts = count(items)


def main() -> int:
    counter, printed = _Counter(), io.StringIO()
    suite = Path(__file__).with_name("conformance")
    with contextlib.redirect_stdout(printed):
        status = pytest.main(["--collect-only", "-qq", str(suite)], [counter])
    if status:
        print(printed.getvalue())
        return status
    print(numbers(counter.counts))
    README.write_text(insert(README.read_text(encoding="utf-8"), kinds(counter.counts)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
