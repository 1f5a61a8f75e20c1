"""Every test here runs for every operation: the names of its arguments say over what.

`case`, `option`, `backend`, `device`, `dtype`, `setting`, `size`, `reverse`, `packed`, `extreme` and `refusal` are
filled from ``ssmscan.ops.cases``. A test that takes `device` runs on the CPU and, marked `gpu`, again on a CUDA device
with Triton.

The mark `grid` changes the choice: ``needs`` names features that the operation must have, ``first`` takes the first
option only, ``every_size`` takes more than the first size, ``cuda_only`` leaves out the CPU, and ``backends``,
``dtypes`` and ``settings`` replace what would be tried.

Triton's interpreter is slow. Of its rows those are marked `slow` that ``interpret`` does not ask for: "none", when
nothing is said, leaves all of them to the GPU; "first" takes a few rows of the first option, in which each value of an
argument occurs; "values" takes such rows of all options.

Of a heavy operation only "values" asks for any; where it is not asked for, other options than the first are slow on all
backends, and with ``spare`` all rows are. With ``costly`` every operation is heavy.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from ssmscan import backend as available
from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, OpCase, Option, Setting, Size
from suite_table import Counts, count

AXES = ("case", "option", "backend", "device", "dtype", "setting", "size", "reverse", "packed", "extreme")
Row = dict[str, Any]

# Sequences of no token, of one, and around the number of steps between two saved states.
LENGTHS = (0, 1, 15, 16, 17, 0, 3)
PACKED_REVERSE = Setting("packed reverse", h0=True, reverse=True, lengths=LENGTHS)
SETTINGS = (
    PLAIN,
    Setting("h0", h0=True),
    Setting("reverse", h0=True, reverse=True),
    Setting("packed", lengths=LENGTHS),
    Setting("packed h0", h0=True, lengths=LENGTHS),
    PACKED_REVERSE,
)

# A failing example names its case, where Hypothesis would write out all of its fields.
for kind in (OpCase, Option):
    kind._repr_pretty_ = lambda self, printer, cycle: printer.text(repr(self))  # type: ignore[union-attr]


@pytest.fixture
def memory(device: str) -> Iterator[None]:
    """Tests that take tens of GiB of a GPU's memory take turns, also those of other processes."""
    if device == "cpu":
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / "ssmscan-gpu-memory.lock"):
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Collected:
    """What was collected, before options such as -m take some of it away."""

    counts: Counts
    files: frozenset[Path]


COLLECTED = pytest.StashKey[Collected]()


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> Collected:
    return pytestconfig.stash[COLLECTED]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = Collected(count(items), frozenset(item.path for item in items))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "grid(needs, first, every_size, ...): what a test of every operation runs over")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "refusal" in metafunc.fixturenames:
        rules = [(case, rule) for case in CASES for rule in case.refused]
        metafunc.parametrize("refusal", rules, ids=[f"{case.name}-{rule.name}" for case, rule in rules])
    if "case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("grid")
    names = [name for name in AXES if name in metafunc.fixturenames]
    wanted = dict(marker.kwargs) if marker else {}
    interpret = wanted.pop("interpret", "none")
    spare, costly = wanted.pop("spare", False), wanted.pop("costly", False)
    # One row for each combination of what the test takes.
    rows = {tuple(_label(name, row[name]) for name in names): row for row in _rows(set(names), **wanted)}
    interpreted = {labels for case in CASES for labels in _quick(rows, case, interpret)}
    quick = {
        labels: not _is_heavy(row, interpret, spare, costly) and (labels in interpreted or not _is_interpreted(row))
        for labels, row in rows.items()
    }
    metafunc.parametrize(
        names,
        [
            pytest.param(*(row[name] for name in names), id="-".join(labels), marks=_marks(row, quick[labels]))
            for labels, row in rows.items()
        ],
    )


def _is_interpreted(row: Row) -> bool:
    return row["backend"] == "triton" and row["device"] == "cpu"


def _marks(row: Row, quick: bool) -> list[pytest.MarkDecorator]:
    if row["device"] == "cuda":
        return [pytest.mark.gpu]
    return [] if quick else [pytest.mark.slow]


def _is_heavy(row: Row, interpret: str, spare: bool, costly: bool) -> bool:
    """Whether a row is slow on any backend."""
    case = row["case"]
    if not (case.heavy or costly) or row["backend"] == "reference":
        return False
    return spare or (interpret != "values" and row["option"] is not case.options[0])


def _quick(rows: dict[tuple[str, ...], Row], case: OpCase, interpret: str) -> Iterator[tuple[str, ...]]:
    """The interpreted rows of ``case`` that are not slow: always the one with most values not yet seen."""
    chosen = {labels: row for labels, row in rows.items() if row["case"] is case and _is_interpreted(row)}
    if case.heavy and interpret != "values":
        interpret = "none"
    if interpret == "first":
        chosen = {labels: row for labels, row in chosen.items() if row["option"] is case.options[0]}
    parts = {labels: set(enumerate(labels)) for labels in chosen}
    missing = set().union(*parts.values()) if interpret != "none" else set()
    while missing:
        best = max(parts, key=lambda labels: len(parts[labels] & missing))
        missing -= parts[best]
        yield best


def _rows(
    names: set[str],
    needs: tuple[Any, ...] = (),
    first: bool = False,
    every_size: bool = False,
    cuda_only: bool = False,
    backends: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    settings: tuple[Setting, ...] = SETTINGS,
) -> Iterator[Row]:
    """What a test that takes ``names`` runs over, with repetitions where it takes less than all."""
    for case in CASES:
        for option in case.options[:1] if first else case.options:
            if not case.has(option, *needs):
                continue
            for backend, device in _places(case, option, backends, not cuda_only, "device" in names):
                row = {"case": case, "option": option, "backend": backend, "device": device}
                for dtype in dtypes or _dtypes(backend):
                    for setting, size in _runs(case, option, settings, every_size, device):
                        row |= {"dtype": dtype, "setting": setting, "size": size}
                        for extreme in case.extremes if "extreme" in names else (None,):
                            for reverse in (False, True) if case.has(option, "reverse") else (False,):
                                for packed in (False, True) if case.has(option, "cu_seqlens") else (False,):
                                    yield row | {"extreme": extreme, "reverse": reverse, "packed": packed}


def _places(
    case: OpCase, option: Option, backends: tuple[str, ...] | None, cpu: bool, cuda: bool
) -> Iterator[tuple[str, str]]:
    """Backends and devices. Those that cannot run on this CPU are left out, as "auto" does."""
    able = ("reference", *(case.backends if option.backends is None else option.backends))
    wanted = [backend for backend in (case.backends if backends is None else backends) if backend in able]
    for backend in wanted:
        if cpu and available.why_not(backend, "cpu", torch.float32) is None:
            yield backend, "cpu"
    # Without kernels of its own an option runs in PyTorch there.
    fastest = "triton" if "triton" in able else "torch"
    if cuda and fastest in wanted:
        yield fastest, "cuda"


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return narrow if backend == "triton" else (torch.float64, *narrow)


def _runs(
    case: OpCase, option: Option, settings: tuple[Setting, ...], every_size: bool, device: str
) -> Iterator[tuple[Setting, Size]]:
    """Each setting at the first size; with ``every_size`` the plain one at all, and packed sequences of long ones."""
    sizes = case.large if device == "cuda" else case.sizes
    for setting in settings:
        if not case.has(option, *setting.needs):
            continue
        for size in sizes[:1] if not every_size else sizes:
            if setting is PLAIN or size is sizes[0]:
                yield setting, size
            elif setting is PACKED_REVERSE and size["l"] > 2 * sum(LENGTHS):
                yield replace(setting, lengths=(*LENGTHS, size["l"] - sum(LENGTHS))), size


def _label(axis: str, value: object) -> str:
    if isinstance(value, bool):
        return axis if value else f"not_{axis}"
    if isinstance(value, dict):
        return "".join(f"{axis}{length}" for axis, length in value.items())
    return str(getattr(value, "name", value)).removeprefix("torch.").replace(", ", "+").replace(" ", "_")
