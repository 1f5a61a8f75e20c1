"""From the command line and YAML files to a TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmscan.shapes import error
from ssmscan.tasks import TASKS
from ssmscan.training.config import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def train_parser(arguments: list[str]) -> ArgumentParser:
    """The parser of ``ssmscan train``, with the options of the task that ``arguments`` name."""
    from jsonargparse import ArgumentParser

    task = _task_name(arguments)
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a model on a task. Every option can stand in the YAML file, and on the command line "
        "overrides it, as in --config recipes/demo.yaml --optim.lr 1e-3.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_argument(
        "--resume", type=str, default=None, help="folder of a run to continue; takes no other option but --mesh"
    )
    parser.add_class_arguments(TrainConfig, skip={"task"})
    parser.add_argument(
        "--task.name",
        type=str,
        default=task,
        help=f"what is learned: {', '.join(TASKS)}; the options of a task are listed with --task.name NAME --help",
    )
    # With its name among its fields, it is made below.
    parser.add_class_arguments(TASKS[task], "task", instantiate=False)
    return parser


def train_config(arguments: list[str], values: Namespace) -> tuple[TrainConfig, bool]:
    """The run that the parsed ``arguments`` ask for, and whether it is to be continued."""
    if values.resume is None:
        fields = {field.name: values[field.name] for field in dataclasses.fields(TrainConfig)}
        task = {name: value for name, value in vars(values.task).items() if name != "name"}
        return TrainConfig(**fields | {"task": TASKS[values.task.name](**task)}), False
    given = dict(train_parser(arguments).parse_args(arguments, defaults=False).items())
    mesh = {name.removeprefix("mesh."): value for name, value in given.items() if name.startswith("mesh.")}
    others = [f"--{name}" for name in sorted(given) if name != "resume" and not name.startswith("mesh.")]
    if others:
        rule = "--resume must be the only option, or come with --mesh"
        raise ValueError(error("train", rule, ", ".join(others), "A run keeps its config."))
    folder = Path(values.resume)
    if not (folder / "config.yaml").is_file():
        raise ValueError(error("train", "--resume must name a run's folder", f"{folder}, which has no config.yaml"))
    if (folder / "metrics.json").is_file():
        raise ValueError(error("train", "--resume must name an unfinished run", f"{folder}, which has its metrics"))
    written = ["--config", str(folder / "config.yaml")]
    parser = train_parser(written)
    config, _ = train_config(written, parser.instantiate(parser.parse_args(written)))
    # The folder may have been moved since, and other processes go on.
    return dataclasses.replace(config, out=str(folder), mesh=dataclasses.replace(config.mesh, **mesh)), True


def _task_name(arguments: list[str]) -> str:
    """The task, which decides what options there are: named by an option, by a YAML file, or the default."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--config", action="append", default=[])
    known.add_argument("--task.name", dest="task")
    given = known.parse_known_args(arguments)[0]
    recipes = [_read_recipe(path) for path in given.config]
    named = [recipe["task"]["name"] for recipe in recipes if "name" in recipe.get("task", {})]
    name = given.task or (named[-1] if named else TrainConfig().task.name)
    if name not in TASKS:
        raise ValueError(error("train", f"task.name must be one of {', '.join(TASKS)}", name))
    return name


def _read_recipe(path: str) -> dict[str, Any]:
    """The options in a YAML file, or a refusal that says what is wrong with it."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as reason:
        raise ValueError(error("train", "--config must name a YAML file", f"{path}: {reason.strerror}")) from None
    except UnicodeDecodeError:
        raise ValueError(error("train", "--config must be UTF-8", path)) from None
    except yaml.YAMLError as reason:
        raise ValueError(error("train", "--config must be YAML", f"{path}: {reason}")) from None
    if not isinstance(options, dict):
        got = "nothing" if options is None else repr(options)
        raise ValueError(error("train", "--config must hold options, as in steps: 100", f"{got} in {path}"))
    for section in ("mesh", "model", "optim", "task"):
        if not isinstance(options.get(section, {}), dict):
            rule = f"--config must map the options of {section} to values"
            raise ValueError(error("train", rule, f"{options[section]!r} in {path}"))
    return options
