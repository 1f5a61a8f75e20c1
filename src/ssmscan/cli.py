"""The command ``ssmscan``: train, generate, eval, tokenize, bench, info.

Exit status 0 for success, 1 for a failed run, 2 for wrong usage, 130 when interrupted, 141 when the output's reader is
gone, 143 when told to end by SIGTERM; an error is one line on stderr.
"""

from __future__ import annotations

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
    from jsonargparse import Namespace

    from ssmscan.training import TrainConfig

# What the extra `train` installs and this command cannot do without.
NEEDED = ("filelock", "jsonargparse", "matplotlib", "rich", "tensorboard", "transformers")

# What a shell reports of a process that SIGINT, SIGPIPE or SIGTERM ended.
INTERRUPTED, UNREAD, TERMINATED = 130, 141, 143


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
    from ssmscan.training.options import train_config

    try:
        command, values = _parse(arguments)
        run = train_config(arguments[1:], values) if command == "train" else None
    except (ArgumentError, TypeError, ValueError) as reason:
        return _misused(_one_line(str(reason)))
    if run is not None:
        return _train(*run)
    if command == "tokenize":
        return _tokenize(values)
    return _info() if command == "info" else _read_model(command, values)


def _train(config: TrainConfig, resume: bool) -> int:
    from ssmscan.training import RunError, Terminated, UsageError, train
    from ssmscan.training.ranks import is_first

    try:
        metrics = train(config, resume)
        if not is_first():
            return 0
        measured = _told(metrics.evaluation)
        if metrics.examination:
            measured += f"; examined: {_told(metrics.examination)}"
        print(
            f"{measured}; held out, after {metrics.steps} steps in {metrics.seconds:.0f} s; "
            f"config, log, plot, metrics and model are in {config.out}",
            flush=True,
        )
    except UsageError as reason:
        return _misused(str(reason))
    except BrokenPipeError:
        return _fail(f"train: the reader of the output is gone.{_how_to_go_on(config)}", UNREAD)
    except OSError as reason:
        message = error("train", f"{reason.filename} must be readable and writable", reason.strerror)
        return _fail(f"{message}{_how_to_go_on(config)}", 1)
    except (RunError, torch.OutOfMemoryError) as reason:
        return _fail(_one_line(str(reason)), 1)
    except KeyboardInterrupt:
        return _stopped("interrupted", config, INTERRUPTED)
    except Terminated:
        return _stopped("terminated, after a checkpoint", config, TERMINATED)
    return 0


def _stopped(how: str, config: TrainConfig, status: int) -> int:
    """The status of a run that was told to end, of which its first process tells."""
    from ssmscan.training.ranks import is_first

    return _fail(f"train: {how}.{_how_to_go_on(config)}", status) if is_first() else status


def _told(measures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measures.items())


def _how_to_go_on(config: TrainConfig) -> str:
    """The command that continues an unfinished run; nothing where there is none."""
    from ssmscan.training.ranks import started

    folder = Path(config.out)
    unfinished = (folder / "config.yaml").is_file() and not (folder / "metrics.json").is_file()
    command = "ssmscan" if started() == 1 else "torchrun … -m ssmscan"
    return f" Continue with {command} train --resume {config.out}." if unfinished else ""


def _fail(message: str, status: int) -> int:
    # In one piece, for other processes may write there as well.
    print(f"{message}\n", end="", file=sys.stderr)
    return status


def _misused(message: str) -> int:
    """The status of wrong usage, of which one process of a machine tells: they were started by the same command."""
    from ssmscan.training.ranks import is_first_here

    return _fail(message, 2) if is_first_here() else 2


def _parse(arguments: list[str]) -> tuple[str, Namespace]:
    from jsonargparse import ArgumentParser

    from ssmscan.generation.command import generate_parser
    from ssmscan.tasks.text.command import tokenize_parser
    from ssmscan.training.eval_command import eval_parser
    from ssmscan.training.options import train_parser

    parser = ArgumentParser(prog="ssmscan", description=ssmscan.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ssmscan {ssmscan.__version__}")
    commands = parser.add_subcommands()
    train_arguments = arguments[1:] if arguments[:1] == ["train"] else []
    for name, subparser, text in (
        ("train", train_parser(train_arguments), "train a model on a task, or continue a run"),
        ("generate", generate_parser(), "continue a text by a model"),
        ("eval", eval_parser(), "measure how well a model foretells a text"),
        ("tokenize", tokenize_parser(), "turn text into tokens to train on"),
        ("bench", ArgumentParser(exit_on_error=False), "check, time and record operations and whole models"),
        ("info", ArgumentParser(exit_on_error=False), "versions, devices, backends"),
    ):
        commands.add_subcommand(name, subparser, help=text)
    parsed = parser.instantiate(parser.parse_args(arguments))
    return parsed.subcommand, parsed[parsed.subcommand]


def _one_line(message: str) -> str:
    """An error of the parser or of PyTorch, in the library's form and on one line."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    key, value = r'Parser key "([^"]*)": ', r"Given value: (.*)"
    message = re.sub(rf"{key}Expected (?:a )?(.*?)\. Got value: (.*)", r"\1 must be \2, got \3.", message)
    message = re.sub(
        rf"{key}Unable to load config '(.*?)' - .*", r"\1 must be options or a YAML file of them, got \2.", message
    )
    message = re.sub(r"unrecognized arguments: (.*)", r"arguments must be among those of --help, got \1.", message)
    among = r"\1: options must be among those of ssmscan \1 --task.name NAME --help, got \2."
    message = re.sub(r"Subcommand '(train)' does not accept option '(.*?)'", among, message)
    several = re.search(rf"{key}Does not validate .*Subtypes: \[(.*?)\] Errors: .* {value}", message)
    if several is not None:
        name, types, got = several.groups()
        message = f"{name} must be {' or '.join(types.split(', ')).replace('NoneType', 'null')}, got {got}."
    return message if re.match(r"\w+: ", message) else f"ssmscan: {message}"


def _read_model(command: str, values: Namespace) -> int:
    """The commands of a model that is there: generate and eval."""
    from ssmscan.generation import command as generate
    from ssmscan.training import eval_command

    try:
        (generate if command == "generate" else eval_command).run(values)
    except BrokenPipeError:
        raise
    except (TypeError, ValueError, NotImplementedError, OSError) as reason:
        return _fail(_one_line(str(reason)), 2)
    return 0


def _tokenize(values: Namespace) -> int:
    from ssmscan.tasks.text import command

    try:
        written = command.run(values)
    except (TypeError, ValueError) as reason:
        return _fail(_one_line(str(reason)), 2)
    except OSError as reason:
        rule = "--out must be a folder that can be written"
        return _fail(error("tokenize", rule, f"{values.out}: {reason.strerror}"), 1)
    print(written)
    return 0


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
