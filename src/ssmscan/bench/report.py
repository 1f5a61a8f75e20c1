"""What a terminal shows of a result."""

import sys
from importlib.util import find_spec

from ssmscan.bench.result import Result, Row
from ssmscan.testing import Size

NAMES = {"fwd": "forward", "fwdbwd": "forward + backward"}


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
            mib(row),
        )
        for row in result.rows
    ]
    print(f"{result.op} on {result.gpu}: {origin(result)}")
    if result.host_us is not None:
        print("host time of a tiny call:", ", ".join(f"{name} {us:.0f} µs" for name, us in result.host_us.items()))
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


def axes(size: Size) -> str:
    """A size in words: b=8 l=8192 d=2048."""
    return " ".join(f"{axis}={length}" for axis, length in size.items())


def origin(result: Result) -> str:
    """When and with what a result was measured."""
    triton = "" if result.triton is None else f", triton {result.triton}"
    return (
        f"{result.date[:10]}, commit {result.commit}, torch {result.torch}{triton}, "
        f"copy limit {result.copy_gbps:.0f} GB/s"
    )


def mib(row: Row) -> str:
    """The peak memory of a row; nothing where it was not measured."""
    return "" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB"
