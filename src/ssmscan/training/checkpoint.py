"""Checkpoints that a crash cannot spoil.

``checkpoints/step_00000500`` holds the model as :func:`ssmscan.models.load_pretrained` reads it, ``training.pt`` (the
optimizer, the random number generators, the seconds spent) and ``manifest.json``, the SHA-256 of each file. They are
written to a temporary folder and synced, the manifest last, then the folder is renamed. A folder whose files do not
match its manifest is not used. Several processes write model and optimizer to ``shards`` in place of the first two's
parts, see :mod:`ssmscan.training.shards`; any number of processes reads either.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ssmscan.tasks import Task
from ssmscan.training.folder import naming, sync
from ssmscan.training.step import Step

_MODEL = "model.safetensors"
_TRAINING = "training.pt"
_SHARDS = "shards"
# What torch.distributed.checkpoint writes of all shards.
_SHARD_INDEX = ".metadata"
_MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})")


def save(
    root: Path,
    step: int,
    update: Step,
    task: Task,
    seconds: float,
    keep: int,
) -> None:
    """Write the checkpoint of ``step`` under ``root``, and remove all but the ``keep`` newest."""
    ranks = update.ranks
    temporary, final = root / f"unfinished_{step:08d}", root / f"step_{step:08d}"
    try:
        if ranks.first:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        training = {"random": _random_state(), "seconds": seconds}
        if ranks.count > 1:
            from ssmscan.training import shards

            ranks.meet()
            shards.save(temporary / _SHARDS, update)
        else:
            save_model(temporary, update.model, task)
            training["update"] = update.state_dict()
        if ranks.first:
            # Through a file of Python's, whose errors say why a write failed.
            with naming(temporary / _TRAINING), (temporary / _TRAINING).open("wb") as file:
                torch.save(training, file)
            with naming(temporary / _MANIFEST):
                _write_manifest(temporary, step)
            # A broken checkpoint of the same step may be in the way.
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(root)
            for old in _checkpoints(root, up_to=step)[keep:]:
                shutil.rmtree(old)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
    ranks.meet()


def save_model(folder: Path, model: PreTrainedModel, task: Task) -> None:
    """Write what :func:`ssmscan.models.load_pretrained` and ``ssmscan generate`` read."""
    with naming(folder / _MODEL), _no_bar():
        model.save_pretrained(folder)
    tokenizer = task.tokenizer()
    if tokenizer is not None:
        with naming(folder / "tokenizer.json"):
            tokenizer.save_pretrained(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the bar that transformers shows for every file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load(root: Path, update: Step) -> tuple[int, float]:
    """Restore the newest complete checkpoint under ``root``, random numbers included; its step and seconds.

    Warns of each broken one that it passes over. Without any, nothing is restored and the step is 0.
    """
    ranks = update.ranks
    step = ranks.told(_newest(root) if ranks.first else 0)
    if step == 0:
        return 0, 0.0
    folder = root / f"step_{step:08d}"
    training = torch.load(folder / _TRAINING, map_location="cpu", weights_only=True)
    if (folder / _SHARDS).is_dir():
        from ssmscan.training import shards

        shards.load(folder / _SHARDS, update)
    elif ranks.count > 1:
        from ssmscan.training import shards

        shards.load_whole(folder / _MODEL, training["update"]["optimizer"], update)
    else:
        load_model(update.model, folder / _MODEL)
        update.load_state_dict(training["update"])
    _set_random_state(training["random"])
    return step, training["seconds"]


def why_no_model(folder: Path) -> tuple[str, str] | None:
    """What a folder is in which a run, or torch.distributed.checkpoint, has left no whole model, and how to get one.

    None for any other folder.
    """
    if (folder / _MODEL).is_file():
        return None
    here = folder.resolve()
    within = [here, *(place.parent for place in (here, *here.parents) if place.name == "checkpoints")]
    run = next((place for place in within if (place / "config.yaml").is_file()), None)
    if run is None:
        shards = "shards of torch.distributed.checkpoint"
        advice = "Load them into a model, and export that by save_pretrained."
        return (shards, advice) if (folder / _SHARD_INDEX).is_file() else None
    newest = next(iter(_checkpoints(run / "checkpoints")), None)
    what = "a run that has not ended" if here == run else "a run's checkpoints"
    if newest is not None and (newest / _MODEL).is_file():
        return what, f"Give a checkpoint, such as {newest}."
    if here != run:
        what += ", in shards of several processes"
    if (run / "metrics.json").is_file():
        return what, f"Give {run}, where the run has left its model."
    return what, f"Continue it by ssmscan train --resume {run}, which leaves a model there."


def _newest(root: Path) -> int:
    """The step of the newest complete checkpoint under ``root``; 0 where there is none."""
    for folder in _checkpoints(root):
        fault = _fault(folder)
        if fault is None:
            return _step(folder)
        warnings.warn(f"checkpoint {folder} is broken ({fault}); trying the one before", stacklevel=3)
    return 0


def _checkpoints(root: Path, up_to: int | None = None) -> list[Path]:
    """The checkpoint folders under ``root``, newest first."""
    found = [path for path in root.glob("step_*") if _STEP.fullmatch(path.name)]
    return sorted((path for path in found if up_to is None or _step(path) <= up_to), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _write_manifest(folder: Path, step: int) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, _sha256(paths), strict=True)}
    for path in folder.rglob("*"):
        sync(path)
    (folder / _MANIFEST).write_text(json.dumps({"step": step, "sha256": hashes}, indent=2), encoding="utf-8")
    sync(folder / _MANIFEST)
    sync(folder)


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file matches the manifest."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        if not (hashes.keys() >= {_TRAINING} and hashes.keys() & {_MODEL, f"{_SHARDS}/{_SHARD_INDEX}"}):
            return f"{_MANIFEST} is not complete"
        for name, found in zip(hashes, _sha256([folder / name for name in hashes]), strict=True):
            if found != hashes[name]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is not readable"
    return None


def _sha256(paths: Sequence[Path]) -> list[str]:
    """Of each file; many at a time, for several processes leave many."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as readers:
        return list(readers.map(digest, paths))


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)
