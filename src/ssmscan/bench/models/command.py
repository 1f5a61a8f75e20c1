"""The command ``ssmscan bench models``."""

from __future__ import annotations

import math
import time
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ssmscan.bench.figures import draw_all
from ssmscan.bench.models import generating, operations, training
from ssmscan.bench.models.experiment import Experiment, Settings, run
from ssmscan.bench.result import machine, read_rows
from ssmscan.models import PRESETS
from ssmscan.shapes import error

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

_SMALL = ("mamba2-130m", "mamba-130m", "transformer-130m")
_LARGE = ("mamba2-1.3b", "mamba-1.4b", "transformer-1.3b")
_MODEL = ("model", "direction", "batch", "length", "mode")
_LINE = ("figure", "line", "direction", "batch", "length")


def _powers(first: int, last: int) -> tuple[int, ...]:
    """2^first … 2^last."""
    return tuple(2**k for k in range(first, last + 1))


def _figure(name: str, batch: int, lengths: tuple[int, ...]) -> Experiment:
    known = tuple(operations.OPERATIONS[name])
    rows = partial(operations.over_length, name)
    return Experiment(rows, Settings(known, (batch,), lengths), known, "figures", _LINE)


EXPERIMENTS = {
    "train": Experiment(training.train, Settings(_SMALL, (8,), (2048,)), (*PRESETS, training.BLOCKS), "models", _MODEL),
    "generate": Experiment(generating.generate, Settings(_SMALL, (1, 64), (512,)), PRESETS, "models", _MODEL),
    "prefill": Experiment(generating.prefill, Settings(_SMALL, (8,), (2048,)), PRESETS, "models", _MODEL),
    "scan_length": _figure("scan_length", 1, _powers(9, 19)),
    "inference_batch": Experiment(
        generating.inference_batch, Settings(_SMALL + _LARGE, _powers(0, 8), (2048,)), PRESETS, "figures", _LINE
    ),
    "train_length": Experiment(
        training.train_length, Settings(_SMALL, (1,), _powers(11, 16)), PRESETS, "figures", _LINE
    ),
    "naive": _figure("naive", 4, _powers(8, 12)),
}


def add_arguments(parser: ArgumentParser) -> None:
    """What ``ssmscan bench models`` can be told."""
    names = ", ".join(EXPERIMENTS)
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help=f"what to measure, of {names}; none names them all"
    )
    parser.add_argument(
        "--models", nargs="+", default=(), metavar="NAME", help="presets; of a figure of operations, its lines"
    )
    parser.add_argument("--batch", type=_positive, nargs="+", default=(), help="sequences at a time")
    parser.add_argument("--lengths", type=_positive, nargs="+", default=(), help="tokens of a sequence or prompt")
    parser.add_argument("--new-tokens", type=_several, default=128, help="generated tokens (default: %(default)s)")
    parser.add_argument(
        "--mode", nargs="+", default=("eager",), choices=training.MODES, help="how a training step is launched"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--images", type=Path, help="folder for pictures of all figures that are recorded")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no row begins (default: no limit)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"a number of at least 1, got {text}")
    return int(text)


def _several(text: str) -> int:
    if _positive(text) < 2:
        raise ArgumentTypeError(f"a number of at least 2, got {text}")
    return int(text)


def run_experiments(given: Namespace) -> bool:
    """Measure what the parsed arguments name, and whether all went well.

    Raises:
        ValueError: an unknown name, or a mode that the device does not have.
    """
    names = given.experiments or list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(error("bench", f"EXPERIMENT must be of {', '.join(EXPERIMENTS)}", name))
        known = EXPERIMENTS[name].known
        for model in given.models:
            if model not in known:
                raise ValueError(error("bench", f"--models of {name} must be of {', '.join(known)}", model))
    if given.device == "cpu" and any(mode.endswith("graph") for mode in given.mode):
        raise ValueError(error("bench", "--mode must be eager or compiled on a CPU", ", ".join(given.mode)))
    settings = Settings(
        models=tuple(given.models),
        batches=tuple(given.batch),
        lengths=tuple(given.lengths),
        modes=tuple(given.mode),
        new_tokens=given.new_tokens,
        checkpointing=given.checkpointing,
        device=given.device,
    )
    end = time.monotonic() + given.seconds
    done = [run(EXPERIMENTS[name], settings, given.out, given.commit, end) for name in names]
    if given.images is not None:
        here = machine(given.device)
        for path in draw_all(read_rows(given.out, "figures").get(here, []), here, given.images):
            print(path)
    return all(done)
