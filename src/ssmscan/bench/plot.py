"""Pictures of results. They need matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmscan.bench.compare import Pair
from ssmscan.bench.report import NAMES, axes
from ssmscan.bench.result import DIRECTIONS, HEADLINE, SWEEP, Result

INK, MUTED, GRID = "#22252b", "#6b7280", "#e5e7eb"
DASHES = (0, (4, 3))
_COLOURS = {"fwd": "#2563eb", "fwdbwd": "#c2410c"}


def over_length(result: Result, path: Path) -> None:
    """Write the picture of time over length, with the floors, of the headline and its sweep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    first = result.rows[0]
    swept = [row for row in result.rows if row.variant in (HEADLINE, SWEEP) and row.backend == first.backend]
    lines = {
        direction: sorted((row for row in swept if row.direction == direction), key=lambda row: row.shape["l"])
        for direction in DIRECTIONS
    }
    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    plane = figure.add_subplot(xscale="log", yscale="log")
    for direction, rows in lines.items():
        lengths = [row.shape["l"] for row in rows]
        colour = _COLOURS[direction]
        plane.fill_between(lengths, [r.p20_ms for r in rows], [r.p80_ms for r in rows], color=colour, alpha=0.15, lw=0)
        plane.plot(lengths, [r.median_ms for r in rows], color=colour, lw=2, marker="o", ms=5, label=NAMES[direction])
        plane.plot(lengths, [r.floor_ms for r in rows], color=colour, lw=1.3, ls=DASHES, label="its floor")
    times = [time for row in swept for time in (row.floor_ms, row.p80_ms)]
    plane.set_ylim(min(times) / 1.6, max(times) * 1.6)
    lengths = sorted({row.shape["l"] for row in swept})
    plane.set_xticks(lengths, [thousands(length) for length in lengths])
    plane.xaxis.set_minor_locator(NullLocator())
    plane.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    plane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plane.yaxis.set_minor_locator(NullLocator())
    plane.set_xlabel("length", color=MUTED)
    plane.set_ylabel("milliseconds", color=MUTED)
    rest = axes({axis: length for axis, length in first.shape.items() if axis not in "bl"})
    tokens = first.shape["b"] * first.shape["l"]
    title = f"{result.op} on {result.gpu.upper()}: {thousands(tokens)} tokens, {rest}, {first.dtype}"
    _finish(figure, plane, title, path)


def over_floor(pairs: Sequence[Pair], gpu: str, path: Path) -> None:
    """Write the picture of ``pairs``: how many times its floor each takes, and the best of the others."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(pairs)), dpi=160, layout="constrained")
    plane = figure.add_subplot(xscale="log")
    for direction, above in zip(DIRECTIONS, (0.16, -0.16), strict=True):
        places = [above - i for i in range(len(pairs))]
        ratios = [pair.rows[direction].ratio_to_floor for pair in pairs]
        colour = _COLOURS[direction]
        plane.plot(ratios, places, color=colour, lw=0, marker="o", ms=7, label=NAMES[direction])
        beside = [
            (place, ratio, ratio * pair.speedup(direction))
            for place, ratio, pair in zip(places, ratios, pairs, strict=True)
            if pair.best
        ]
        for place, ratio, other in beside:
            plane.plot([ratio, other], [place, place], color=colour, lw=1.3, alpha=0.5)
        plane.plot(
            [other for *_, other in beside], [place for place, *_ in beside],
            color=colour, lw=0, marker="o", ms=7, mfc="white", mew=1.6,
        )  # fmt: skip
    if any(pair.best for pair in pairs):
        plane.plot([], [], color=MUTED, lw=0, marker="o", ms=7, mfc="white", mew=1.6, label="best public kernel")
    plane.axvline(1, color=MUTED, lw=1.3, ls=DASHES)
    plane.set_yticks([-i for i in range(len(pairs))], [_label(pair) for pair in pairs])
    plane.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    plane.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plane.xaxis.set_minor_locator(NullLocator())
    _finish(figure, plane, f"Time over the floor on {gpu.upper()}", path)


def speedups(rows: Sequence[Mapping[str, Any]], gpu: str, path: Path) -> None:
    """Write the picture of how many times faster transformers' models run when patched, by benchmarks/patched.py."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ordered = sorted(rows, key=lambda row: (row["direction"] != "train", row["model"]))
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(rows)), dpi=160, layout="constrained")
    plane = figure.add_subplot(xscale="log")
    for direction, colour in zip(("train", "generate"), _COLOURS.values(), strict=True):
        places = [-i for i, row in enumerate(ordered) if row["direction"] == direction]
        ratios = [ordered[-place]["ratio"] for place in places]
        plane.barh(places, [ratio - 1 for ratio in ratios], left=1, height=0.5, color=colour, label=direction)
        for place, ratio in zip(places, ratios, strict=True):
            row = ordered[-place]
            text = f" {ratio:.3g}×: {row['before_s']:.3g} s to {row['after_s']:.3g} s"
            plane.text(ratio, place, text, va="center", color=INK, fontsize=9)
    plane.axvline(1, color=MUTED, lw=1.3, ls=DASHES)
    plane.set_xlim(0.9, 12 * max(row["ratio"] for row in rows))
    plane.set_yticks([-i for i in range(len(ordered))], [row["model"] for row in ordered])
    plane.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    plane.xaxis.set_major_locator(LogLocator(subs=(1,)))
    plane.xaxis.set_minor_locator(NullLocator())
    shape = axes({"layers": ordered[0]["layers"], "b": ordered[0]["batch"], "l": ordered[0]["length"]})
    _finish(figure, plane, f"transformers' models, patched, on {gpu.upper()}: {shape}", path)


def _label(pair: Pair) -> str:
    return pair.row.op + ("" if pair.row.variant == HEADLINE else f", {pair.row.variant}")


def _finish(figure, plane, title: str, path: Path) -> None:
    style(plane)
    plane.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1.0), labelcolor=INK, fontsize=9)
    save(figure, title, path)


def style(plane) -> None:
    """A grid instead of a frame."""
    plane.grid(color=GRID, lw=0.8)
    plane.set_axisbelow(True)
    plane.tick_params(which="both", length=0, colors=MUTED)
    for spine in plane.spines.values():
        spine.set_visible(False)


def save(figure, title: str, path: Path) -> None:
    """Write the picture, under its title."""
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=11, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def thousands(length: int) -> str:
    """4096 as 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
