"""Other libraries' times, recorded by hand as ``<gpu>/others.json``, beside our own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmscan.bench.result import DIRECTIONS, HEADLINE, SWEEP, Result, Row, read_rows


@dataclass(frozen=True)
class Other:
    """Another library's time at one of our benchmarks; ``source`` says how it was measured, and when."""

    op: str
    shape: Mapping[str, int]
    variant: str
    direction: str
    name: str
    ms: float
    source: str


@dataclass(frozen=True)
class Pair:
    """A benchmark of one operation, by direction, and the best of the others at it, who may be nobody."""

    rows: Mapping[str, Row]
    best: Mapping[str, Other]

    @property
    def row(self) -> Row:
        """The forward's, for what both have in common."""
        return self.rows["fwd"]

    def speedup(self, direction: str) -> float:
        """How many times as fast as the best of the others."""
        return self.best[direction].ms / self.rows[direction].median_ms


def read_others(folder: Path) -> dict[str, list[Other]]:
    """The others' times of each machine under ``folder``."""
    return {gpu: [Other(**row) for row in rows] for gpu, rows in read_rows(folder, "others").items()}


def pairs(results: Sequence[Result], others: Sequence[Other]) -> list[Pair]:
    """Every benchmark that ``results`` of one machine time in both directions, sweeps aside."""
    found: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in (row for result in results for row in result.rows if row.variant != SWEEP):
        benchmark = (row.op, row.variant, *row.shape.items())
        # The backends after the first are there to compare with.
        found.setdefault(benchmark, {}).setdefault(row.direction, row)
    return [Pair(rows, _best(rows["fwd"], others)) for rows in found.values() if len(rows) == len(DIRECTIONS)]


def _best(row: Row, others: Sequence[Other]) -> dict[str, Other]:
    """By direction, the times of the one who is quickest forward and backward."""
    by_name: dict[str, dict[str, Other]] = {}
    for other in others:
        if (other.op, other.variant, dict(other.shape)) == (row.op, row.variant, dict(row.shape)):
            by_name.setdefault(other.name, {})[other.direction] = other
    return min(by_name.values(), key=lambda times: times["fwdbwd"].ms, default={})


def headlines(found: Sequence[Pair]) -> list[Pair]:
    """Of each operation the headline and, where no other has it, its first benchmark that another has."""
    chosen = []
    for pair in found:
        if pair.row.variant == HEADLINE:
            chosen.append(pair)
            beside = [other for other in found if other.row.op == pair.row.op and other.best]
            if beside and not pair.best:
                chosen.append(beside[0])
    return chosen


def machine_of(results: Sequence[Result], others: Mapping[str, Sequence[Other]]) -> str:
    """The machine for README: a GPU rather than the CPU, with the most operations, with the most times of others."""
    return max(
        {result.gpu for result in results},
        key=lambda gpu: (gpu != "cpu", sum(r.gpu == gpu for r in results), len(others.get(gpu, ())), gpu),
    )
