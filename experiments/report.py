"""Writes what is recorded under experiments into docs/experiments.md, and draws its pictures.

    python -m experiments.report
    python -m experiments.report RECORDS    # a table of the runs that are recorded in a folder of your own, printed

On the page a pair of markers, <!-- results: NAME --> and <!-- end of NAME -->, holds what this writes of NAME.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from experiments import plots
from experiments.record import Record, read_records

ROOT = Path(__file__).parents[1]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """The mean of the seeds, and the least and greatest where these differ."""
    numbers = [scale * value for value in values]
    told = [f"{number:.{digits}f}" for number in (mean(numbers), min(numbers), max(numbers))]
    return told[0] if told[1] == told[2] else f"{told[0]} ({told[1]}–{told[2]})"


def by_kind(records: Iterable[Record], part: int | None = None) -> dict[str, list[Record]]:
    """The records of each kind, or of each ``part`` of its name, as in mamba-128."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record.kind if part is None else record.kind.split("-")[part], []).append(record)
    return kinds


def accuracies(records: Iterable[Record]) -> list[float]:
    return [record.metrics["evaluation"]["accuracy"] for record in records]


def selective_copying(records: Sequence[Record], picture: Path) -> str:
    kinds = by_kind(records)
    ranked = sorted(kinds, key=lambda kind: -mean(accuracies(kinds[kind])))
    figure, planes = plots.panels(1, 1, "Selective copying, 16 of 4096 tokens, 2 layers of width 64")
    plots.over_steps(planes[0], {kind: kinds[kind] for kind in ranked}, lambda run: run.curve("eval", "accuracy"))
    planes[0].set(xlabel="step", ylabel="accuracy at 4096 tokens", ylim=(0, 1.03))
    plots.finish(figure, planes, picture)
    rows = [
        [
            f"`{kind}`",
            spread(accuracies(kinds[kind])),
            spread([run.metrics["steps"] for run in kinds[kind]], 1, 0),
            spread([run.metrics["seconds"] for run in kinds[kind]], 1, 0),
            f"{kinds[kind][0].metrics['parameters']:,}",
        ]
        for kind in ranked
    ]
    return table(["mixer", "accuracy (%)", "steps", "seconds", "parameters"], rows)


def induction_heads(records: Sequence[Record], picture: Path) -> str:
    kinds: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for name, value in record.metrics["examination"].items():
            length = int(name.removeprefix("accuracy_at_"))
            kinds.setdefault(record.kind, {}).setdefault(length, []).append(value)
    figure, planes = plots.panels(1, 1, "Induction heads, learned at up to 1024 tokens")
    plots.over_places(planes[0], kinds)
    planes[0].set(xlabel="tokens", ylabel="accuracy", ylim=(0, 1.03))
    plots.finish(figure, planes, picture)
    lengths = sorted({length for values in kinds.values() for length in values})[::2]
    rows = [
        [f"`{kind}`", *(spread(values[length], digits=0) if length in values else "–" for length in lengths)]
        for kind, values in kinds.items()
    ]
    return table(["accuracy (%) at", *map(plots.short, lengths)], rows)


def associative_recall(records: Sequence[Record], picture: Path) -> str:
    kinds = {
        kind: {int(width): accuracies(of) for width, of in by_kind(runs, 1).items()}
        for kind, runs in by_kind(records, 0).items()
    }
    figure, planes = plots.panels(1, 1, "Associative recall, 32 pairs in 256 tokens, 2 layers")
    plots.over_places(planes[0], kinds)
    planes[0].set(xlabel="width of the model", ylabel="accuracy", ylim=(0, 1.03))
    plots.finish(figure, planes, picture)
    widths = sorted({width for values in kinds.values() for width in values})
    rows = [
        [f"`{kind}`", *(spread(values[w]) if w in values else "–" for w in widths)] for kind, values in kinds.items()
    ]
    return table(["accuracy (%) at width", *map(str, widths)], rows)


def copying(records: Sequence[Record], picture: Path) -> str:
    lengths = by_kind(records, 0)
    figure, planes = plots.panels(len(lengths), 2, "Copying by 12 layers of GatedSSM in three precisions")
    rows = []
    for place, (length, runs) in enumerate(sorted(lengths.items(), key=lambda item: int(item[0]))):
        kinds = by_kind(runs, 1)
        loss, accuracy = planes[2 * place : 2 * place + 2]
        plots.over_steps(loss, kinds, lambda run: run.curve("eval", "loss"))
        plots.over_steps(accuracy, kinds, lambda run: run.curve("eval", "accuracy"))
        loss.set(xlabel="step", ylabel=f"loss, {length} symbols", yscale="log")
        accuracy.set(xlabel="step", ylabel=f"accuracy, {length} symbols", ylim=(0, 1.03))
        for kind, of in kinds.items():
            losses = [run.metrics["evaluation"]["loss"] for run in of]
            rows.append([length, f"`{kind}`", f"{mean(losses):.2g}", spread(accuracies(of), digits=2)])
    plots.finish(figure, planes, picture)
    return table(["symbols", "precision", "loss (nats)", "accuracy (%)"], rows)


def books_sweep(records: Sequence[Record], picture: Path) -> str:
    losses = {record.kind: record.metrics["evaluation"]["loss"] for record in records}
    names = [kind.split("-", 1) for kind in losses]
    rates = sorted({rate for _, rate in names}, key=float)
    rows = []
    for model in dict.fromkeys(model for model, _ in names):
        own = {rate: losses[f"{model}-{rate}"] for rate in rates if f"{model}-{rate}" in losses}
        told = {rate: f"{loss:.3f}" for rate, loss in own.items()}
        best = min(own, key=lambda rate: own[rate])
        told[best] = f"**{told[best]}**"
        rows.append([f"`{model}`", *(told.get(rate, "–") for rate in rates)])
    return table(["loss at a learning rate of", *rates], rows)


def books(records: Sequence[Record], picture: Path) -> str:
    figure, planes = plots.panels(1, 2, "126 million parameters on the same text")
    ranked = sorted(records, key=lambda run: run.metrics["evaluation"]["loss"])
    kinds = {record.kind: [record] for record in ranked}

    def over_tokens(run: Record) -> tuple[list[float], list[float]]:
        steps, losses = run.curve("eval", "loss")
        tokens = run.config["batch_size"] * run.config["task"]["length"]
        return [step * tokens / 1e6 for step in steps], losses

    plots.over_steps(planes[0], kinds, over_tokens)
    plots.over_steps(planes[1], kinds, lambda run: run.curve("eval", "loss", "seconds"))
    planes[0].set(xlabel="million tokens", ylabel="loss, held out (nats a token)")
    planes[1].set(xlabel="seconds")
    plots.finish(figure, planes, picture)
    return table(
        [
            "model", "parameters", "learning rate", "valid: perplexity", "bits a byte", "test: perplexity",
            "bits a byte", "seconds", "tokens/s", "peak GiB", "greatest gradient norm", "spikes",
        ],
        map(_books_row, ranked),
    )  # fmt: skip


def _books_row(run: Record) -> list[str]:
    measured = [
        f"{run.about['evaluations'][part][measure]:.{digits}f}" if part in run.about["evaluations"] else "–"
        for part in ("eval", "test")
        for measure, digits in (("perplexity", 2), ("bits_per_byte", 3))
    ]
    about = run.about
    return [
        f"`{run.kind}`", f"{run.metrics['parameters'] / 1e6:.1f} M", f"{run.config['optim']['lr']:g}", *measured,
        f"{run.metrics['seconds']:.0f}", f"{about['tokens_per_second'] / 1000:.0f}K",
        f"{about['peak_gib']:.1f}" if "peak_gib" in about else "–",
        f"{about['max_grad_norm']:.2f}", str(about["spikes"]),
    ]  # fmt: skip


def log(records: Sequence[Record], root: str) -> str:
    """Every run, those that failed too, with links to the records under ``root``."""
    rows = []
    for run in sorted(records, key=lambda run: (run.about["date"], run.group, run.folder.name)):
        about, metrics = run.about, run.metrics
        result = ", ".join(f"{name} {value:.4g}" for name, value in metrics.get("evaluation", {}).items())
        rows.append(
            [
                about["date"], f"[{run.group}/{run.folder.name}]({root}/{run.group}/{run.folder.name})",
                str(metrics.get("steps", "–")), f"{metrics['seconds']:.0f}" if metrics else "–",
                metrics.get("device", "–"), about["commit"] or "–",
                result if about["status"] == "finished" else f"failed: {about['error']}",
            ]
        )  # fmt: skip
    return table(["date", "run", "steps", "seconds", "card", "commit", "result"], rows)


# What is written of each group, and drawn in the file of its name.
SECTIONS: dict[str, Callable[[Sequence[Record], Path], str]] = {
    section.__name__: section
    for section in (selective_copying, induction_heads, associative_recall, copying, books_sweep, books)
}


def origin(records: Sequence[Record]) -> str:
    """Where and when the records were made."""
    cards = dict.fromkeys(record.metrics["device"] for record in records)
    commits = dict.fromkeys(record.about["commit"] for record in records if record.about["commit"])
    dates = sorted({record.about["date"] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    at = f", commit {', '.join(commits)}" if commits else ""
    return f"{len(records)} runs, {when}, {', '.join(cards)}{at}."


def insert(page: str, name: str, content: str) -> str:
    """``page`` with ``content`` between the markers of ``name``."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end of {name} -->"
    written, times = re.subn(
        f"{begin}\n.*?{end}", lambda _: "\n".join(part for part in (begin, content, end) if part), page, flags=re.DOTALL
    )
    if times != 1:
        raise ValueError(f"insert: page must hold {begin} and, after it, {end}, once each, got {times} pairs.")
    return written


def write(records: Sequence[Record], page: str, images: Path) -> str:
    """``page`` with all that is to be said of the ``records``; pictures go to ``images``."""
    for name, section in SECTIONS.items():
        own = [record for record in records if record.group == name and record.about["status"] == "finished"]
        picture = images / f"{name}.png"
        parts = [section(own, picture), origin(own)] if own else ["Not run yet."]
        if own and picture.is_file():
            parts.append(f"![{name.replace('_', ' ')}](images/{picture.name})")
        page = insert(page, name, "\n\n".join(parts))
    return insert(page, "log", log(records, "../experiments") if records else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="?", help="a folder whose runs to print as a table instead")
    own = parser.parse_args().records
    if own is not None:
        if not (records := read_records(own)):
            parser.error(f"RECORDS must be a folder that experiments.run has recorded runs in, got {own}.")
        print(log(records, str(own)))
        return
    path = ROOT / "docs" / "experiments.md"
    written = write(read_records(ROOT / "experiments"), path.read_text(encoding="utf-8"), path.parent / "images")
    path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
