"""Pictures of what was recorded. They need matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.record import Record

_INK, _MUTED, _GRID = "#22252b", "#6b7280", "#e5e7eb"
_COLOURS = {
    "mamba": "#2563eb",
    "mamba2": "#c2410c",
    "hybrid": "#7c3aed",
    "attention": "#15803d",
    "transformer": "#15803d",
    "s4d": "#6b7280",
    "rg_lru": "#be185d",
    "gated_ssm": "#0d9488",
    "float32": "#2563eb",
    "bfloat16": "#c2410c",
    "float16": "#15803d",
}

# A run's curve: its places, and its value at each.
Curve = tuple[Sequence[float], Sequence[float]]


def panels(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    """A figure, and its planes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if columns == 1 else 4.8 * columns, 1.4 + 2.8 * rows), dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", color=_INK, fontsize=11, fontweight="bold")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def finish(figure: Any, planes: Sequence[Any], path: Path) -> None:
    """The grid, the legend of the first plane, and the file."""
    for plane in planes:
        plane.grid(color=_GRID, lw=0.8)
        plane.set_axisbelow(True)
        plane.tick_params(which="both", length=0, colors=_MUTED)
        plane.xaxis.label.set_color(_MUTED)
        plane.yaxis.label.set_color(_MUTED)
        for spine in plane.spines.values():
            spine.set_visible(False)
    handles, labels = planes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside lower left", labelcolor=_INK, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(kind: str) -> str:
    return _COLOURS.get(kind.split("-")[0], _INK)


def _dashes(kind: str) -> str:
    """Broken for a variant, as in mamba-long."""
    return "--" if "-" in kind else "-"


def over_steps(plane: Any, kinds: Mapping[str, Sequence[Record]], curve: Callable[[Record], Curve]) -> None:
    """A thin line for each run, and one name for all of a kind."""
    for kind, records in kinds.items():
        for place, record in enumerate(records):
            label = kind if place == 0 else None
            plane.plot(*curve(record), color=_colour(kind), lw=1.4, ls=_dashes(kind), alpha=0.8, label=label)


def over_places(plane: Any, kinds: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    """The mean of each kind over places on a logarithmic axis, and from the least to the greatest as a band."""
    from matplotlib.ticker import NullLocator

    places = sorted({place for values in kinds.values() for place in values})
    for kind, values in kinds.items():
        at, colour = sorted(values), _colour(kind)
        least, most = ([pick(values[place]) for place in at] for pick in (min, max))
        plane.fill_between(at, least, most, color=colour, alpha=0.15, lw=0)
        means = [mean(values[p]) for p in at]
        plane.plot(at, means, color=colour, lw=2, ls=_dashes(kind), marker="o", ms=4, label=kind)
    plane.set_xscale("log", base=2)
    plane.set_xticks(places[:: -(-len(places) // 8)], [short(place) for place in places[:: -(-len(places) // 8)]])
    plane.xaxis.set_minor_locator(NullLocator())


def short(number: int) -> str:
    """65536 as 64K, for an axis or the head of a column."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
