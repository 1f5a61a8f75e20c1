"""What a reader sees of the results: a table in the terminal, tables in README.md, and a plot of time over length."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ssmscan.bench.result import DIRECTIONS, HEADLINE, SWEEP, Result, Row
from ssmscan.shapes import error
from ssmscan.testing import Size

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"

_INK, _MUTED, _GRID = "#22252b", "#6b7280", "#e5e7eb"
_COLOURS = {"fwd": "#2563eb", "fwdbwd": "#c2410c"}
_NAMES = {"fwd": "forward", "fwdbwd": "forward + backward"}


def tables(results: Sequence[Result], headlines: bool = False) -> str:
    """The results in Markdown: for each machine what ran there, and a table of all but the sweeps, or of headlines."""
    parts = []
    for gpu in sorted({result.gpu for result in results}, key=lambda name: (name == "cpu", name)):
        here = [result for result in results if result.gpu == gpu]
        parts.append(
            f"**{gpu.upper()}**: median times. The floor is the time in which this machine copies the bytes that the "
            "call must read and write, or does its arithmetic; memory is the peak over that of the inputs."
        )
        header = ("operation", "shape", "dtype", "direction", "time", "floor", "time / floor", "memory")
        lines = [header, (*["---"] * 4, *["---:"] * 4)]
        lines += [
            (
                _operation(row, result),
                axes(row.shape),
                row.dtype,
                _NAMES[row.direction],
                f"{row.median_ms:.3g} ms",
                f"{row.floor_ms:.3g} ms",
                f"{row.ratio_to_floor:.2f}",
                _mib(row),
            )
            for result in here
            for row in result.rows
            if (row.variant == HEADLINE if headlines else row.variant != SWEEP)
        ]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts.append("\n".join(f"- {result.op}: {_origin(result)}." for result in here))
    return "\n\n".join(parts)


def insert(text: str, content: str) -> str:
    """``text`` with ``content`` between its two markers. ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        got = f"{text.count(BEGIN)} and {text.count(END)}"
        raise ValueError(error("insert", f"text must hold {BEGIN} and, after it, {END}, once each", got))
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def show(result: Result) -> None:
    """Print all rows of ``result``."""
    header = ("variant", "shape", "dtype", "direction", "backend", "ms", "floor", "ratio", "memory")
    lines = [
        (
            row.variant,
            axes(row.shape),
            row.dtype,
            row.direction,
            row.backend,
            f"{row.median_ms:.4g}",
            f"{row.floor_ms:.4g}",
            f"{row.ratio_to_floor:.2f}",
            _mib(row),
        )
        for row in result.rows
    ]
    print(f"{result.op} on {result.gpu}: {_origin(result)}")
    if find_spec("rich") is not None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, box=SIMPLE_HEAD)
        for line in lines:
            table.add_row(*line)
        # A file has no width to fit.
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        return
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def plot(result: Result, path: Path) -> None:
    """Write the picture of time over length, with the floors, of the headline and its sweep. Needs matplotlib."""
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
        plane.plot(lengths, [r.median_ms for r in rows], color=colour, lw=2, marker="o", ms=5, label=_NAMES[direction])
        plane.plot(lengths, [r.floor_ms for r in rows], color=colour, lw=1.3, ls=(0, (4, 3)), label="its floor")
    times = [time for row in swept for time in (row.floor_ms, row.p80_ms)]
    plane.set_ylim(min(times) / 1.6, max(times) * 1.6)
    lengths = sorted({row.shape["l"] for row in swept})
    plane.set_xticks(lengths, [_thousands(length) for length in lengths])
    plane.xaxis.set_minor_locator(NullLocator())
    plane.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    plane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plane.yaxis.set_minor_locator(NullLocator())
    plane.set_xlabel("length", color=_MUTED)
    plane.set_ylabel("milliseconds", color=_MUTED)
    plane.grid(color=_GRID, lw=0.8)
    plane.set_axisbelow(True)
    plane.tick_params(which="both", length=0, colors=_MUTED)
    for spine in plane.spines.values():
        spine.set_visible(False)
    plane.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1.0), labelcolor=_INK, fontsize=9)
    rest = axes({axis: length for axis, length in first.shape.items() if axis not in "bl"})
    tokens = first.shape["b"] * first.shape["l"]
    figure.suptitle(
        f"{result.op} on {result.gpu.upper()}: {_thousands(tokens)} tokens, {rest}, {first.dtype}",
        x=0.02, ha="left", color=_INK, fontsize=11, fontweight="bold",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _operation(row: Row, result: Result) -> str:
    remarks = [] if row.variant == HEADLINE else [row.variant]
    # The backends after the first are there to compare with.
    remarks += [] if row.backend == result.rows[0].backend else [f'backend="{row.backend}"']
    return f"`{row.op}`" + (f" ({'; '.join(remarks)})" if remarks else "")


def _origin(result: Result) -> str:
    host = ""
    if result.host_us is not None:
        us = result.host_us
        host = (
            f", host time of a tiny call {us['fwd']:.0f} µs forward, {us['fwdbwd']:.0f} µs forward + backward "
            f"(attention {us['sdpa fwd']:.0f} and {us['sdpa fwdbwd']:.0f})"
        )
    triton = "" if result.triton is None else f", triton {result.triton}"
    return (
        f"{result.date[:10]}, commit {result.commit}, torch {result.torch}{triton}, "
        f"copy limit {result.copy_gbps:.0f} GB/s{host}"
    )


def axes(size: Size) -> str:
    """A size in words: b=8 l=8192 d=2048."""
    return " ".join(f"{axis}={length}" for axis, length in size.items())


def _mib(row: Row) -> str:
    return "" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB"


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
