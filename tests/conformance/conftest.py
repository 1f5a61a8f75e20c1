"""Every test here runs for every operation: the names of its arguments say over what.

`case`, `option`, `backend`, `device`, `dtype`, `setting`, `size`, `extreme` and `refusal` are filled from
``ssmscan.ops.cases``.
A test that takes `device` runs on the CPU and, marked `gpu`, again on a CUDA device with Triton.

The mark `grid` changes the choice: ``needs`` names features that the operation must have, ``first`` takes the first
option only, ``every_size`` takes more than the first size, and ``backends``, ``dtypes`` and ``settings`` replace what
would be tried.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ssmscan import backend as available
from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, OpCase, Option, Setting, Size

AXES = ("case", "option", "backend", "device", "dtype", "setting", "size", "extreme")

# Sequences of no token, of one, and around the number of steps between two saved states.
LENGTHS = (0, 1, 15, 16, 17, 0, 3)
SETTINGS = (
    PLAIN,
    Setting("h0", h0=True),
    Setting("reverse", h0=True, reverse=True),
    Setting("packed", lengths=LENGTHS),
    Setting("packed h0", h0=True, lengths=LENGTHS),
    Setting("packed reverse", h0=True, reverse=True, lengths=LENGTHS),
)

# A failing example names its case, where Hypothesis would write out all of its fields.
for kind in (OpCase, Option):
    kind._repr_pretty_ = lambda self, printer, cycle: printer.text(repr(self))  # type: ignore[attr-defined]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "grid(needs, first, every_size, backends, dtypes, settings): what a test runs over"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "refusal" in metafunc.fixturenames:
        rules = [(case, rule) for case in CASES for rule in case.refused]
        metafunc.parametrize("refusal", rules, ids=[f"{case.name}-{rule.name}" for case, rule in rules])
    if "case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("grid")
    names = [name for name in AXES if name in metafunc.fixturenames]
    rows: dict[str, tuple[dict[str, Any], bool]] = {}
    for row, gpu in _rows(set(names), **(marker.kwargs if marker else {})):
        rows["-".join(_label(row[name]) for name in names)] = (row, gpu)
    metafunc.parametrize(
        names,
        [
            pytest.param(*(row[name] for name in names), id=label, marks=[pytest.mark.gpu] if gpu else [])
            for label, (row, gpu) in rows.items()
        ],
    )


def _rows(
    names: set[str],
    needs: tuple[Any, ...] = (),
    first: bool = False,
    every_size: bool = False,
    backends: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    settings: tuple[Setting, ...] = SETTINGS,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """What a test that takes ``names`` runs over, and whether that needs a GPU."""
    for case in CASES:
        for option in case.options[:1] if first else case.options:
            if not case.has(option, *needs):
                continue
            for backend, device in _places(case, backends, "device" in names):
                gpu = device == "cuda"
                row = {"case": case, "option": option, "backend": backend, "device": device}
                for dtype in dtypes or _dtypes(backend):
                    for setting, size in _runs(case, option, settings, every_size, gpu):
                        for extreme in case.extremes if "extreme" in names else (None,):
                            yield row | {"dtype": dtype, "setting": setting, "size": size, "extreme": extreme}, gpu


def _places(case: OpCase, backends: tuple[str, ...] | None, cuda: bool) -> Iterator[tuple[str, str]]:
    """Backends and devices. Those of the CPU are left out where they cannot run, which `auto` does as well."""
    wanted = case.backends if backends is None else backends
    for backend in wanted:
        if available.why_not(backend, "cpu", torch.float32) is None:
            yield backend, "cpu"
    if cuda and "triton" in wanted:
        yield "triton", "cuda"


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return narrow if backend == "triton" else (torch.float64, *narrow)


def _runs(
    case: OpCase, option: Option, settings: tuple[Setting, ...], every_size: bool, gpu: bool
) -> Iterator[tuple[Setting, Size]]:
    """Each setting at the first size, the plain one at every size."""
    sizes = case.large if gpu else case.sizes
    for setting in settings:
        if case.has(option, *setting.needs):
            for size in sizes if every_size and setting is PLAIN else sizes[:1]:
                yield setting, size


def _label(value: object) -> str:
    if isinstance(value, dict):
        return "".join(f"{axis}{length}" for axis, length in value.items())
    return str(getattr(value, "name", value)).removeprefix("torch.").replace(", ", "+").replace(" ", "_")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
