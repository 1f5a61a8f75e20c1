"""The command ``ssmscan``: train, bench, info.

Exit status 0 for success, 1 for a failed run, 2 for wrong usage, 130 when interrupted, 141 when the output's reader is
gone; an error is one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import platform
import re
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
NEEDED = ("jsonargparse", "rich", "matplotlib", "tensorboard", "filelock")

# What a shell reports of a process that SIGINT or SIGPIPE ended.
INTERRUPTED, UNREAD = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (default: those of the process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing and arguments[:1] != ["bench"]:
        return _fail(f"ssmscan: {', '.join(missing)} must be installed, got none. Run pip install 'ssmscan[train]'.", 1)
    with _lines_alone():
        try:
            status = _run(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return _fail("ssmscan: interrupted.", INTERRUPTED)
        except BrokenPipeError:
            return UNREAD
        except SystemExit as end:
            # What rich makes of a closed pipe.
            if isinstance(end.__context__, BrokenPipeError):
                return UNREAD
            raise
        finally:
            _drop_unread()


@contextmanager
def _lines_alone() -> Iterator[None]:
    """Whatever happens is told in lines of text that the terminal, file or pipe at the other end can take."""
    if hasattr(sys.stdout, "reconfigure"):
        # A name or a sample that stdout's encoding lacks costs no run.
        sys.stdout.reconfigure(errors="backslashreplace")
    report, threading.excepthook = threading.excepthook, _pass_over
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            yield
    finally:
        threading.excepthook = report


def _pass_over(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes files has met a full disk, say: whoever waits for it raises the same error."""
    if failed.exc_type is None or not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _drop_unread() -> None:
    """Leave nothing for a closed pipe, on which Python would fail once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:
        # It has a parser of its own, so that it runs where the extra `train` is missing.
        return bench.main(arguments[1:], prog="ssmscan bench")
    from ssmscan.training import RunError, UsageError, train

    try:
        command, values = _parse(arguments)
        if command == "info":
            return _info()
        config, resume = _train_config(arguments, values)
    except (ArgumentError, ValueError) as reason:
        return _fail(_one_line(str(reason)), 2)
    try:
        metrics = train(config, resume)
        print(
            f"accuracy {metrics.accuracy:.4f} on fresh data after {metrics.steps} steps in {metrics.seconds:.0f} s; "
            f"config, log, plot, metrics and weights are in {config.out}",
            flush=True,
        )
    except UsageError as reason:
        return _fail(str(reason), 2)
    except BrokenPipeError:
        return _fail(f"train: the reader of the output is gone.{_how_to_go_on(config)}", UNREAD)
    except OSError as reason:
        message = error("train", f"{reason.filename} must be readable and writable", reason.strerror)
        return _fail(f"{message}{_how_to_go_on(config)}", 1)
    except (RunError, torch.OutOfMemoryError) as reason:
        return _fail(_one_line(str(reason)), 1)
    except KeyboardInterrupt:
        return _fail(f"train: interrupted.{_how_to_go_on(config)}", INTERRUPTED)
    return 0


def _how_to_go_on(config: TrainConfig) -> str:
    """The command that continues an unfinished run; nothing where there is none."""
    folder = Path(config.out)
    unfinished = (folder / "config.yaml").is_file() and not (folder / "metrics.json").is_file()
    return f" Continue with ssmscan train --resume {config.out}." if unfinished else ""


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _parse(arguments: list[str]) -> tuple[str, Namespace]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="ssmscan", description=ssmscan.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ssmscan {ssmscan.__version__}")
    commands = parser.add_subcommands()
    commands.add_subcommand("train", _train_parser(), help="train a model on a task, or continue a run")
    commands.add_subcommand("bench", ArgumentParser(exit_on_error=False), help="check, time and record operations")
    commands.add_subcommand("info", ArgumentParser(exit_on_error=False), help="versions, devices, backends")
    if arguments[:1] == ["train"]:
        _check_recipes(arguments[1:])
    parsed = parser.instantiate(parser.parse_args(arguments))
    return parsed.subcommand, parsed[parsed.subcommand]


def _check_recipes(arguments: list[str]) -> None:
    """Refuse a file behind --config that cannot be read, or holds no options."""
    import yaml

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--config", action="append", default=[])
    for name in known.parse_known_args(arguments)[0].config:
        try:
            options = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except OSError as reason:
            raise ValueError(error("train", "--config must name a YAML file", f"{name}: {reason.strerror}")) from None
        except UnicodeDecodeError:
            raise ValueError(error("train", "--config must be UTF-8", name)) from None
        except yaml.YAMLError as reason:
            raise ValueError(error("train", "--config must be YAML", f"{name}: {reason}")) from None
        if not isinstance(options, dict):
            got = "nothing" if options is None else repr(options)
            raise ValueError(error("train", "--config must hold options, as in steps: 100", f"{got} in {name}"))


def _train_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from ssmscan.training import TrainConfig

    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a model on a task. Every option can stand in the YAML file, and on the command line "
        "overrides it, as in --config recipes/demo.yaml --optim.lr 1e-3.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_argument("--resume", type=str, default=None, help="folder of a run to continue; takes no other option")
    parser.add_class_arguments(TrainConfig)
    return parser


def _train_config(arguments: list[str], values: Namespace) -> tuple[TrainConfig, bool]:
    """The run that is asked for, and whether it is to be continued."""
    from ssmscan.training import TrainConfig

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: values[name] for name in names})
    if values.resume is None:
        return config, False
    others = set(_train_parser().parse_args(arguments[1:], defaults=False).keys()) - {"resume"}
    if others:
        got = ", ".join(f"--{name}" for name in sorted(others))
        raise ValueError(error("train", "--resume must be the only option", got, "A run keeps its config."))
    folder = Path(values.resume)
    if not (folder / "config.yaml").is_file():
        raise ValueError(error("train", "--resume must name a run's folder", f"{folder}, which has no config.yaml"))
    if (folder / "metrics.json").is_file():
        raise ValueError(error("train", "--resume must name an unfinished run", f"{folder}, which has its metrics"))
    written = ["train", "--config", str(folder / "config.yaml")]
    config, _ = _train_config(written, _parse(written)[1])
    # The folder may have been moved since.
    return dataclasses.replace(config, out=str(folder)), True


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
            table.add_row(name, device, choose(name, "auto", device, torch.float32), cannot or "-")
    console.print(table)
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
