"""What is kept of a run: config, metrics, evaluations, a thinned log, and in record.json how it went."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ssmscan.training.report import read_log

# Lines of each split that stay in a log.
LINES = 80
# A step counts as a spike where its loss is so much above the median of as many logged steps before it (nats).
_SPIKE, _BEFORE = 0.5, 10


@dataclass(frozen=True)
class Record:
    """What is kept of a run: ``kind`` and ``seed`` are the parts of its name, ``about`` is record.json."""

    folder: Path
    kind: str
    seed: int
    about: dict[str, Any]

    @property
    def group(self) -> str:
        return self.folder.parent.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The options of the run; none where it did not begin."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Its last evaluation, its examination and the rest; none of one that did not end."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def curve(self, split: str, measure: str, over: str = "step") -> tuple[list[float], list[float]]:
        """A measure of the log over its steps or seconds."""
        lines = [line for line in read_log(self.folder) if line["split"] == split]
        return [line[over] for line in lines], [line[measure] for line in lines]


def read_records(root: Path) -> list[Record]:
    """All records under ``root``, by group and name."""
    records = []
    for path in sorted(root.glob("*/*/record.json")):
        kind, _, seed = path.parent.name.rpartition("-")
        records.append(Record(path.parent, kind, int(seed), json.loads(path.read_text(encoding="utf-8"))))
    return records


def keep(run: Path, record: Path, about: dict[str, Any]) -> None:
    """Copy what a few kilobytes can tell of the ``run`` to ``record``, and ``about`` it."""
    record.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, record / name)
    lines = read_log(run)
    with (record / "log.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(json.dumps(_short(line)) + "\n" for line in thinned(lines))
    evaluations = {
        path.stem.removeprefix("evaluation_"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run.glob("evaluation_*.json"))
        if path.stat().st_size
    }
    whole = {**about, **training(lines), "evaluations": evaluations}
    (record / "record.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def last_loss(folder: Path) -> float:
    """The loss of a finished run's last evaluation (nats)."""
    return float(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["evaluation"]["loss"])


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most LINES of each split, evenly chosen, the last among them."""
    kept = set()
    for split in ("train", "eval"):
        places = [place for place, line in enumerate(lines) if line["split"] == split]
        apart = -(-len(places) // LINES)
        kept |= set(places[::-1][:: max(apart, 1)])
    return [line for place, line in enumerate(lines) if place in kept]


def training(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Speed, memory and stability of a training, by all the lines of its log."""
    steps = [line for line in lines if line["split"] == "train"]
    if not steps:
        return {}
    losses = [line["loss"] for line in steps]
    spikes = sum(losses[i] > median(losses[i - _BEFORE : i]) + _SPIKE for i in range(_BEFORE, len(losses)))
    told = {
        "tokens_per_second": median(line["tokens_per_second"] for line in steps),
        # Behind the first tenth, where the gradient of a model that knows nothing is long.
        "max_grad_norm": max(line["grad_norm"] for line in steps[len(steps) // 10 :]),
        "spikes": spikes,
    }
    peaks = [line["peak_gib"] for line in steps if "peak_gib" in line]
    return told | ({"peak_gib": max(peaks)} if peaks else {})


def _short(line: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
