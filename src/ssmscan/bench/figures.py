"""Pictures of what ``ssmscan bench models`` recorded in figures.json. They need matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ssmscan.bench.plot import DASHES, INK, MUTED, save, style, thousands
from ssmscan.bench.report import NAMES
from ssmscan.bench.result import DIRECTIONS

Row = Mapping[str, Any]

_BLUE, _GREEN, _ORANGE, _VIOLET = "#2563eb", "#0f766e", "#c2410c", "#7c3aed"
# Name and colour of a line; a model's go by its family.
_LINES = {
    "selective_scan": ("selective_scan", _BLUE),
    "ssd": ("ssd", _GREEN),
    "attention": ("attention", _ORANGE),
    "convolution": ("FFT convolution", _VIOLET),
    "loop": ("loop in Python", _ORANGE),
    "torch": ("PyTorch's operations", _VIOLET),
    "mamba": ("Mamba", _BLUE),
    "mamba2": ("Mamba-2", _GREEN),
    "transformer": ("Transformer", _ORANGE),
}


class Panel(NamedTuple):
    """One plane of a picture: the rows that it shows, and what is drawn of them.

    ``against`` is a line in times of which the last point of each slower one is told.
    """

    title: str
    shows: Callable[[Row], bool]
    value: str
    unit: str
    scale: str = "log"
    against: str | None = None


class Figure(NamedTuple):
    """One picture, from left to right; ``axis`` is what grows. The title names fields of a row."""

    title: str
    axis: str
    panels: tuple[Panel, ...]


def _large(row: Row) -> bool:
    return row["line"].endswith("b")


def _goes(direction: str, row: Row) -> bool:
    return row["direction"] == direction


_OPERATIONS = tuple(
    Panel(NAMES[direction], partial(_goes, direction), "ms", "milliseconds", against="selective_scan")
    for direction in DIRECTIONS
)
FIGURES = {
    "scan_length": Figure("Batch {batch}, 1024 channels, bfloat16", "length", _OPERATIONS),
    "inference_batch": Figure(
        "Generating {new_tokens} tokens after {length}",
        "batch",
        (
            Panel("130M", lambda row: not _large(row), "call_tokens_per_s", "tokens/s"),
            Panel("1.3B", _large, "call_tokens_per_s", "tokens/s"),
        ),
    ),
    "train_length": Figure(
        "Training, {tokens} tokens in every step",
        "length",
        (
            Panel("rate", lambda row: True, "tokens_per_s", "tokens/s", "linear"),
            Panel("memory", lambda row: True, "peak_gib", "GiB", "linear"),
        ),
    ),
    "naive": Figure("selective_scan: batch {batch}, 1536 channels, float32", "length", _OPERATIONS),
}


def draw(name: str, rows: Sequence[Row], gpu: str, path: Path) -> None:
    """Write the picture of those of ``rows`` that belong to the figure ``name``."""
    from matplotlib.figure import Figure as Picture

    figure, rows = FIGURES[name], [row for row in rows if row["figure"] == name]
    panels = [panel for panel in figure.panels if any(map(panel.shows, rows))]
    picture = Picture(figsize=(9.6, 4.2), dpi=160, layout="constrained")
    planes = picture.subplots(1, len(panels), squeeze=False)[0]
    for plane, panel in zip(planes, panels, strict=True):
        _panel(plane, panel, figure.axis, [row for row in rows if panel.shows(row)])
    lines = {text: line for plane in planes for line, text in zip(*plane.get_legend_handles_labels(), strict=True)}
    picture.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False, labelcolor=INK
    )
    title = figure.title.format(**rows[0], tokens=thousands(rows[0]["batch"] * rows[0]["length"]))
    save(picture, f"{title}, on {gpu.upper()}", path)


def draw_all(rows: Sequence[Row], gpu: str, folder: Path) -> list[Path]:
    """Write ``<figure>-<gpu>.png`` of every figure that ``rows`` have something for."""
    names = [name for name in FIGURES if any(row["figure"] == name for row in rows)]
    paths = [folder / f"{name}-{gpu}.png" for name in names]
    for name, path in zip(names, paths, strict=True):
        draw(name, rows, gpu, path)
    return paths


def _panel(plane, panel: Panel, axis: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    plane.set_xscale("log", base=2)
    plane.set_yscale(panel.scale)
    for i, line in enumerate(dict.fromkeys(row["line"] for row in rows)):
        own = sorted((row for row in rows if row["line"] == line), key=lambda row: row[axis])
        text, colour = _LINES.get(line.split("-")[0], (line, MUTED))
        points = [(row[axis], row[panel.value]) for row in own if row.get(panel.value) is not None]
        if not points:
            continue
        # Ever thinner, for where two are alike.
        plane.plot(*zip(*points, strict=True), color=colour, lw=3.2 - 0.6 * i, marker="o", ms=4.5, label=text)
        full = [row[axis] for row in own if _full(row)]
        if full:
            (place, value), end = points[-1], full[0]
            plane.plot([place, end], [value, value], color=colour, lw=1.3, ls=DASHES)
            plane.plot(end, value, color=colour, lw=0, marker="x", ms=8, mew=2)
        base = [row[panel.value] for row in rows if row["line"] == panel.against and row[axis] == points[-1][0]]
        if base and base[0] is not None and points[-1][1] > 1.5 * base[0]:
            ratio = f"{points[-1][1] / base[0]:.0f}×"
            plane.annotate(ratio, points[-1], (-6, 2), textcoords="offset points", ha="right", color=colour, fontsize=9)
    if any(map(_full, rows)):
        plane.plot([], [], color=MUTED, lw=0, marker="x", ms=8, mew=2, label="out of memory")
    ticks = sorted({row[axis] for row in rows})
    # So many labels fit beside each other.
    ticks = ticks[:: -(-len(ticks) // 9)]
    plane.set_xticks(ticks, [thousands(tick) for tick in ticks])
    plane.xaxis.set_minor_locator(NullLocator())
    plane.yaxis.set_major_formatter(FuncFormatter(_short))
    plane.yaxis.set_minor_formatter(NullFormatter())
    if panel.scale == "linear":
        plane.set_ylim(0, 1.08 * plane.get_ylim()[1])
    else:
        bottom, top = plane.get_ylim()
        plane.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if top < 300 * bottom else (1.0,)))
    plane.set_xlabel(axis, color=MUTED)
    plane.set_ylabel(panel.unit, color=MUTED)
    plane.set_title(panel.title, color=INK, fontsize=10, loc="left")
    style(plane)


def _full(row: Row) -> bool:
    return "out of memory" in row.get("left_out", "")


def _short(value: float, _: object) -> str:
    """20000 as 20k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
