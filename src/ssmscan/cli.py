"""The command ``ssmscan``: train, bench, info.

Exit status 0 for success, 1 for a failed run, 2 for wrong usage, 130 when interrupted; an error is one line on stderr.
"""

from __future__ import annotations

import dataclasses
import inspect
import platform
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ssmscan
from ssmscan import ops
from ssmscan.backend import BACKENDS, choose, why_not
from ssmscan.bench import __main__ as bench
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ssmscan.training import TrainConfig

# What the extra `train` installs and this command cannot do without.
NEEDED = ("jsonargparse", "rich", "matplotlib", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (default: those of the process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing and arguments[:1] != ["bench"]:
        return _fail(f"ssmscan: {', '.join(missing)} must be installed, got none. Run pip install 'ssmscan[train]'.", 1)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return _run(arguments)
        except KeyboardInterrupt:
            return _fail("ssmscan: interrupted.", 130)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:
        # It has a parser of its own, so that it runs where the extra `train` is missing.
        return bench.main(arguments[1:], prog="ssmscan bench")
    from ssmscan.training import RunError, UsageError, train

    try:
        command, values = _parse(arguments)
        if command == "info":
            return _info()
        config, resume = _train_config(values)
    except (ArgumentError, ValueError) as reason:
        return _fail(_one_line(str(reason)), 2)
    try:
        metrics = train(config, resume)
    except UsageError as reason:
        return _fail(str(reason), 2)
    except (RunError, OSError, torch.OutOfMemoryError) as reason:
        return _fail(_one_line(str(reason)), 1)
    except KeyboardInterrupt:
        return _fail(f"train: interrupted. Continue with ssmscan train --resume {config.out}.", 130)
    print(
        f"accuracy {metrics.accuracy:.4f} on fresh data after {metrics.steps} steps in {metrics.seconds:.0f} s; "
        f"config, log, plot, metrics and weights are in {config.out}"
    )
    return 0


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _parse(arguments: list[str]) -> tuple[str, Namespace]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="ssmscan", description=ssmscan.__doc__, exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"ssmscan {ssmscan.__version__}")
    commands = parser.add_subcommands()
    commands.add_subcommand("train", _train_parser(), help="train a model on a task, or continue a run")
    commands.add_subcommand("bench", ArgumentParser(exit_on_error=False), help="check, time and record operations")
    commands.add_subcommand("info", ArgumentParser(exit_on_error=False), help="versions, devices, backends")
    parsed = parser.instantiate(parser.parse_args(arguments))
    return parsed.subcommand, parsed[parsed.subcommand]


def _train_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from ssmscan.training import TrainConfig

    parser = ArgumentParser(
        exit_on_error=False,
        description="Train a model on a task. Every option can stand in the YAML file, and on the command line "
        "overrides it, as in --config recipes/demo.yaml --optim.lr 1e-3.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_argument("--resume", type=str, default=None, help="folder of a run to continue; takes no other option")
    parser.add_class_arguments(TrainConfig)
    return parser


def _train_config(values: Namespace) -> tuple[TrainConfig, bool]:
    """The run that is asked for, and whether it is to be continued."""
    from ssmscan.training import TrainConfig

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: values[name] for name in names})
    if values.resume is None:
        return config, False
    if config != TrainConfig():
        raise ValueError(error("train", "--resume must be the only option", "others", "A run keeps its config."))
    folder = Path(values.resume)
    if not (folder / "config.yaml").is_file():
        raise ValueError(error("train", "--resume must name a run's folder", f"{folder}, which has no config.yaml"))
    if (folder / "metrics.json").is_file():
        raise ValueError(error("train", "--resume must name an unfinished run", f"{folder}, which has its metrics"))
    _, values = _parse(["train", "--config", str(folder / "config.yaml")])
    config, _ = _train_config(values)
    # The folder may have been moved since.
    return dataclasses.replace(config, out=values.resume or str(folder)), True


def _one_line(message: str) -> str:
    """An error of the parser or of PyTorch, in the library's form and on one line."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(
        r'Parser key "([^"]*)": Expected (?:a )?(.*?)\. Got value: (.*)', r"\1 must be \2, got \3.", message
    )
    return message if re.match(r"\w+: ", message) else f"ssmscan: {message}"


def _info() -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    packages = {name: _version(name) for name in ("torch", "numpy", "triton", "numba", "safetensors")}
    console.print(f"ssmscan {ssmscan.__version__}, python {platform.python_version()}, {platform.platform()}")
    console.print(", ".join(f"{name} {number}" for name, number in packages.items()))
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    console.print(f"cpu: {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        console.print(f"cuda:{i}: {torch.cuda.get_device_name(i)}")

    table = Table("operation", "device", 'backend="auto" takes', "which cannot run here, and why")
    for name in ops.__all__:
        if "backend" not in inspect.signature(getattr(ops, name)).parameters:
            continue
        for device in devices:
            reasons = {backend: why_not(backend, device, torch.float32) for backend in BACKENDS}
            cannot = "; ".join(f"{backend} {reason}" for backend, reason in reasons.items() if reason is not None)
            table.add_row(name, device, choose(name, "auto", device, torch.float32), cannot or "–")
    console.print(table)
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
