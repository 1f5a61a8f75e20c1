"""What an experiment is, and how its rows come to stand in a file."""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssmscan.bench.result import commit, machine, now, replace_rows, versions

Row = dict[str, Any]
# Of a row: what tells it from others, and the measurement, which gives the rest.
Planned = tuple[Row, Callable[[], Row]]


class LeftOutError(Exception):
    """A row is not measured, for the reason that the message gives."""


@dataclass(frozen=True)
class Settings:
    """What an experiment goes through; what is empty is as the experiment has it.

    Args:
        models: presets, or the operations that an experiment knows.
        batches: sequences at a time.
        lengths: tokens of a sequence, or of a prompt.
        modes: how a training step is launched.
        new_tokens: tokens to generate after a prompt.
        checkpointing: compute activations again in the backward.
        device: "cuda" or "cpu".
    """

    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    modes: tuple[str, ...] = ("eager",)
    new_tokens: int = 128
    checkpointing: bool = False
    device: str = "cpu"

    def over(self, defaults: "Settings") -> "Settings":
        """These settings, with ``defaults`` where they are empty."""
        empty = {field.name: getattr(defaults, field.name) for field in fields(self) if getattr(self, field.name) == ()}
        return replace(self, **empty)


class Experiment(NamedTuple):
    """``rows`` plans what is measured; the file holds one row for each combination of ``key``."""

    rows: Callable[[Settings], Iterator[Planned]]
    defaults: Settings
    # What can be named as a model.
    known: tuple[str, ...]
    file: str
    key: tuple[str, ...]


def run(
    experiment: Experiment,
    settings: Settings,
    out: Path | None,
    source: str | None = None,
    end: float = math.inf,
) -> bool:
    """Measure row after row; print each, and write it to ``out/<gpu>/<file>.json``, before the next one begins.

    Args:
        experiment: what to measure.
        settings: at which sizes.
        out: the folder of results; None writes nothing.
        source: the commit to record; None asks git.
        end: no row begins later than this, as ``time.monotonic`` counts (seconds).

    Returns:
        Whether all went well. A row that does not fit in memory, or would take too long, says so and is no failure.
    """
    origin = {"commit": source or commit(), "torch": versions()[0]}
    well = True
    for about, measure in experiment.rows(settings.over(experiment.defaults)):
        if time.monotonic() > end:
            print(f"bench: the time is over before {json.dumps(about)}", file=sys.stderr)
            break
        _free()
        found, fault = _attempt(measure)
        well = well and not fault
        row = {**about, **found}
        print(json.dumps(row), flush=True)
        if out is not None:
            path = out / machine(settings.device) / f"{experiment.file}.json"
            replace_rows(path, [{**row, **origin, "date": now()}], experiment.key)
    return well


def _attempt(measure: Callable[[], Row]) -> tuple[Row, bool]:
    """What was measured, or the reason why nothing was, and whether that is a fault."""
    try:
        return measure(), False
    except LeftOutError as reason:
        return {"left_out": str(reason)}, False
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}, False
    # One row that fails, whatever the reason, must not cost the others.
    except Exception as wrong:
        return {"left_out": f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:300]}"}, True


def _free() -> None:
    """Give back what the row before held."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
