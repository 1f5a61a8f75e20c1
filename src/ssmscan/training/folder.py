"""A run's folder: one run at a time, files that are written whole, and errors that name the file.

The lock is the operating system's (``.lock``, held open while the run lives), so a run that was killed blocks nobody.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ssmscan.shapes import error
from ssmscan.training.config import ModelConfig, TrainConfig, plain, to_yaml
from ssmscan.training.errors import UsageError

# All that a run leaves in its folder, beside the lock.
RUN_FILES = (
    "config.yaml",
    "metrics.json",
    "log.jsonl",
    "curves.png",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "checkpoints",
    "tensorboard",
)
LOCK = ".lock"


@contextmanager
def claimed(config: TrainConfig, resume: bool) -> Iterator[Path]:
    """The folder of a run, made or cleared for a new one, and locked while it lasts.

    Raises:
        UsageError: the folder cannot be written, or belongs to something else: other files, a finished run that is not
            to be replaced, a run that is going on, one of another model that is to be continued.
    """
    folder = Path(config.out)
    if not resume:
        _check_free(folder, config.overwrite)
    with _locked(folder):
        if not resume:
            # Once more, for another run may have come and gone since.
            _check_free(folder, config.overwrite)
            _clear(folder)
            with _writable(folder):
                replace_text(folder / "config.yaml", to_yaml(config))
        else:
            _check_same_model(folder / "config.yaml", config)
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / LOCK).acquire(blocking=False)
        except Timeout:
            raise UsageError(
                error("train", "out must be a folder of its own", f"{folder}, where a run is going on", "Wait for it.")
            ) from None
    with lock:
        yield


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise UsageError(
            error("train", "out must be a folder that can be written", f"{folder}: {reason.strerror}")
        ) from None


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(error("train", "out must be a folder", f"the file {folder}"))
    if not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir()):
        return
    if not (folder / "config.yaml").exists():
        raise UsageError(error("train", "out must be an empty folder or a run's", folder, "Choose another --out."))
    if not overwrite:
        raise UsageError(
            error(
                "train",
                "out must be a new folder",
                f"{folder}, which holds a run",
                f"Replace it with --overwrite true, or continue an unfinished one with --resume {folder}.",
            )
        )


def _check_same_model(begun: Path, config: TrainConfig) -> None:
    """Refuse to continue by another model, which may take some weights of a checkpoint and leave the others."""
    if not begun.exists():
        return
    import yaml

    before = replace(config, model=ModelConfig(**yaml.safe_load(begun.read_text(encoding="utf-8"))["model"]))
    kept, given = plain(before)["model"], plain(config)["model"]
    others = {name: value for name, value in given.items() if value != kept[name]}
    if others:
        rule = f"model must be that of {begun} to continue the run"
        raise UsageError(error("train", rule, others, "Begin another in a new folder."))


def _clear(folder: Path) -> None:
    for name in RUN_FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Writing ``path``: a failure of the disk raises an OSError that has the file's name.

    PyTorch and safetensors hide it in errors of their own, and Python does not name a file that is open already.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as failure:
        reason = _disk_error(failure)
        if reason is None:
            raise
        raise OSError(reason.errno, reason.strerror or str(reason), reason.filename or str(path)) from None


def _disk_error(failure: Exception) -> OSError | None:
    for cause in (failure, failure.__context__):
        if isinstance(cause, OSError):
            return cause
    code = re.search(r"\(os error (\d+)\)", str(failure))
    return None if code is None else OSError(int(code[1]), os.strerror(int(code[1])))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".unfinished")
    with naming(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a log."""
    with naming(path), path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and syncs its entries by itself.
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
