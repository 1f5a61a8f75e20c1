"""What a run tells: a progress bar, log.jsonl, TensorBoard, a plot."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssmscan.training.config import Target, TrainConfig, plain
from ssmscan.training.folder import append_line, naming, replace_text


class Log:
    """The lines of a run up to ``step`` and from there on, told to nobody: what all but one of several processes keep.

    A context manager, as :class:`Report` is.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.jsonl"
        self.lines = [line for line in read_log(folder) if line["step"] <= step]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was opened."""

    def advance(self, step: int) -> None:
        """Show that ``step`` is done."""

    def training(self, step: int, **values: float) -> None:
        """Log a training step: its loss, lr, grad_norm, tokens_per_second and seconds."""
        self._write("train", step, values)

    def evaluation(self, step: int, measures: dict[str, float], seconds: float) -> dict[str, Any]:
        """Log an evaluation, and return its line."""
        return self._write("eval", step, {**measures, "seconds": seconds})

    def newest(self, split: str) -> dict[str, Any] | None:
        """The newest line of the log of ``split``."""
        return next((line for line in reversed(self.lines) if line["split"] == split), None)

    def _write(self, split: str, step: int, values: dict[str, float]) -> dict[str, Any]:
        line = {"split": split, "step": step, **values}
        self.lines.append(line)
        return line


class Report(Log):
    """The live side of a run, from ``step`` on; a context manager that closes what it opened.

    ``log.jsonl`` gets one JSON object a line. ``{"split": "train", "step", "loss", "lr", "grad_norm",
    "tokens_per_second", "seconds"}``, on CUDA with ``peak_gib`` and ``mfu``; or ``{"split": "eval", "step",
    "seconds"}`` with what the task measures, ``loss`` and ``accuracy`` at least. Lines after ``step``, which a killed
    run had written, are dropped.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder, step)
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._board_folder = folder / "tensorboard"
        self._wandb = None if config.wandb is None else _wandb(config)
        with naming(self._board_folder):
            self._board = SummaryWriter(str(self._board_folder), purge_step=step + 1)
        # What is printed while the bar stands goes through this console, as it is.
        console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            # Where no one watches, as in a CI log, the lines of the evaluations are all there is.
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=config.steps, completed=step, loss="-", accuracy="-", speed="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))
        try:
            with naming(self._board_folder):
                self._board.close()
        except OSError:
            if error is None:
                raise

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def training(self, step: int, **values: float) -> None:
        super().training(step, **values)
        self._bar.update(self._task, loss=f"{values['loss']:.3f}", speed=_short(values["tokens_per_second"]))

    def evaluation(self, step: int, measures: dict[str, float], seconds: float) -> dict[str, Any]:
        line = super().evaluation(step, measures, seconds)
        self._bar.update(self._task, accuracy=f"{measures['accuracy']:.3f}")
        told = [f"step {step:>6}", *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measures.items())]
        trained = self.newest("train")
        if trained is not None:
            told.append(f"{_short(trained['tokens_per_second'])} tokens/s")
        print("   ".join([*told, f"{seconds:.0f} s"]), flush=True)
        return line

    def _write(self, split: str, step: int, values: dict[str, float]) -> dict[str, Any]:
        line = super()._write(split, step, values)
        append_line(self.path, line)
        with naming(self._board_folder):
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        return line


def _wandb(config: TrainConfig) -> Any:
    """A run of Weights & Biases that follows the TensorBoard log; it must begin before that."""
    import wandb

    named = {"project": config.wandb, "name": config.out, "dir": config.out}
    return wandb.init(**named, config=plain(config), sync_tensorboard=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log in a run's folder; none where there is no log, nor the half line of a killed run."""
    path, lines = folder / "log.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot(path: Path, title: str, lines: Sequence[dict[str, Any]], measure: str, target: Target | None) -> None:
    """Draw the loss and a measure over the steps, from the lines of a log, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    train = [line for line in lines if line["split"] == "train"]
    evals = [line for line in lines if line["split"] == "eval"]
    blue, orange, grey = "#3a6ea5", "#d1702c", "#8a8a8a"
    figure = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    left, right = figure.subplots(1, 2)

    left.plot(*_columns(train, "loss"), color=blue, alpha=0.45, linewidth=1, label="training batch")
    left.plot(*_columns(evals, "loss"), color=orange, marker="o", markersize=3.5, label="held out")
    left.set(title="loss (nats per answer token)", xlabel="step", yscale="log")
    left.yaxis.set_major_formatter(LogFormatter())
    left.yaxis.set_minor_formatter(LogFormatter())
    left.legend(frameon=False)

    right.plot(*_columns(evals, measure), color=orange, marker="o", markersize=3.5, label="held out")
    if target is not None:
        right.axhline(target.bound, color=grey, linestyle="--", linewidth=1, label=f"target {target.bound:g}")
    if evals:
        final = evals[-1]
        right.annotate(
            f"{final[measure]:.4f}",
            (final["step"], final[measure]),
            xytext=(-6, -14),
            textcoords="offset points",
            ha="right",
            color=orange,
        )
    right.set(title=measure.replace("_", " "), xlabel="step")
    if measure == "accuracy":
        right.set(title="accuracy (fraction of answer tokens)", ylim=(0, 1.04))
    right.legend(frameon=False)

    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    temporary = path.with_name("unfinished_" + path.name)
    with naming(path):
        figure.savefig(temporary)
        os.replace(temporary, path)


def _columns(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[name] for line in lines]


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
