"""What the files of experiments list: runs, each a training and the evaluations behind it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import yaml

from experiments.record import last_loss
from ssmscan.shapes import check_integer, error

RECIPES = Path(__file__).parent.parent / "recipes"
# What a group may hold. A mapping in YAML is a dict, and what is left empty None.
_GROUP = {"recipe": str, "seeds": list, "slots": int, "options": dict, "evaluate": list, "runs": dict}


@dataclass
class Run:
    """A training and the evaluations behind it. ``status`` is finished, failed, or None while there is more to do."""

    name: str
    recipe: str
    seed: int
    slots: int
    options: dict[str, Any]
    evaluate: Sequence[str]
    folder: Path
    waits_for: list[Self] = field(default_factory=list)
    status: str | None = None

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder, which is the training's own."""
        return self.folder.with_name(self.folder.name + suffix)

    def next_command(self) -> tuple[list[str], Path] | None:
        """What ``ssmscan`` is to do next, and the file for what it prints; None when all is done."""
        config = self.folder / "config.yaml"
        if not (self.folder / "metrics.json").is_file():
            if config.is_file():
                return ["train", "--resume", str(self.folder)], self.beside(".out")
            given = {**self.options, "seed": self.seed, "out": str(self.folder)}
            texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
            options = [part for name, text in texts.items() for part in (f"--{name}", text)]
            return ["train", "--config", str(RECIPES / f"{self.recipe}.yaml"), *options], self.beside(".out")
        for part in self.evaluate:
            measured = self.folder / f"evaluation_{part}.json"
            if not measured.is_file() or not measured.read_text():
                task = yaml.safe_load(config.read_text(encoding="utf-8"))["task"]
                options = ["--data", task["data"], "--length", str(task["length"]), "--part", part, "--json"]
                return ["eval", "--model", str(self.folder), *options], measured
        return None

    def settle(self) -> None:
        """Give the options that are the best of other runs their values."""
        for name, value in self.options.items():
            if pattern := _pattern(value):
                ended = [run for run in self.waits_for if fnmatch(run.name, pattern) and run.status == "finished"]
                if not ended:
                    raise ValueError(f"{self.name}: {name} must be that of a finished run, got none of {pattern}.")
                best = min(ended, key=lambda run: last_loss(run.folder)).options[name]
                self.options[name] = best * value["times"] if "times" in value else best


def _pattern(value: object) -> str | None:
    return value.get("best_of") if isinstance(value, dict) else None


def read(paths: Sequence[Path], folder: Path) -> list[Run]:
    """The runs of the files in their order, and how each of them ended before.

    Raises:
        TypeError, ValueError: a file does not list runs as it should.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        for group, about in _groups(path).items():
            for name, own in about["runs"].items():
                place = f"{path}, {group}/{name}"
                _require(isinstance(own, dict), place, "must map options to values", own)
                options = {"recipe": about.get("recipe"), **about.get("options", {}), **own}
                recipe = options.pop("recipe")
                _require((RECIPES / f"{recipe}.yaml").is_file(), place, f"recipe must name a file of {RECIPES}", recipe)
                patterns = list(filter(None, map(_pattern, options.values())))
                for pattern in patterns:
                    rule = "best_of must match an earlier run's name, group/run-seed"
                    _require(any(fnmatch(name, pattern) for name in runs), place, rule, pattern)
                waits_for = [run for run in runs.values() if any(fnmatch(run.name, pattern) for pattern in patterns)]
                for seed in about.get("seeds", [0]):
                    full = f"{group}/{name}-{seed}"
                    _require(full not in runs, place, "group/run-seed must name one run", f"{full} twice")
                    evaluate, slots = about.get("evaluate", []), about.get("slots", 1)
                    run = Run(full, recipe, seed, slots, dict(options), evaluate, folder / full, waits_for)
                    if run.beside(".json").is_file():
                        run.status = json.loads(run.beside(".json").read_text())["status"]
                    runs[full] = run
    return list(runs.values())


def _groups(path: Path) -> dict[str, dict[str, Any]]:
    """The groups of a file by their names."""
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise ValueError(error("experiments", f"{path} must be YAML", " ".join(str(reason).split()))) from None
    _require(isinstance(groups, dict), str(path), "must map names to groups of runs", groups)
    for group, about in groups.items():
        place = f"{path}, {group}"
        _require(isinstance(about, dict) and "runs" in about, place, "must be a group with runs", about)
        for name, value in about.items():
            _require(name in _GROUP, place, f"a group must have {', '.join(_GROUP)}", name)
            _require(isinstance(value, _GROUP[name]), place, f"{name} must be a {_GROUP[name].__name__}", value)
        check_integer(place, "slots", about.get("slots", 1), 1)
        for seed in about.get("seeds", []):
            check_integer(place, "each of seeds", seed, 0)
    return groups


def _require(holds: bool, place: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(error("experiments", f"{place}: {rule}", got))
