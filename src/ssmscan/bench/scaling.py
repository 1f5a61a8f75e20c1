"""What several GPUs recorded, as a table and a picture: what each does beside what one does alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmscan.bench.pages import table
from ssmscan.bench.plot import thousands

Row = Mapping[str, Any]

HEADER = ("what", "mesh", "GPUs", "tokens", "chunk", "time", "tokens/s", "per GPU, of one", "memory", "sent")


def page(machines: Mapping[str, Sequence[Row]]) -> str:
    """All machines, with the picture of each."""
    if not machines:
        return "Not measured yet."
    return "\n\n".join(
        f"{section(machine, rows)}\n\n![Several GPUs of {machine}](images/scaling-{machine}.png)"
        for machine, rows in machines.items()
    )


def section(machine: str, rows: Sequence[Row]) -> str:
    """The links of a machine, and all that was measured on it."""
    timed = [row for row in rows if row["experiment"] != "links"]
    told = [f"### {machine}", *(_links(row) for row in rows if row["experiment"] == "links")]
    if timed:
        lines = [_line(row, timed) for row in sorted(timed, key=_order)]
        told.append(table(HEADER, lines, "llrrrrrrrr"))
        sources = sorted({f"{row['date'][:10]}, commit {row['commit']}, torch {row['torch']}" for row in timed})
        told.append(f"{'; '.join(sources)}.")
    return "\n\n".join(told)


def efficiency(row: Row, rows: Sequence[Row]) -> tuple[float, str] | None:
    """What part of one GPU's best rate each of several has, and whether that had as many tokens as each, or as all."""
    alone = [
        other
        for other in rows
        if other["gpus"] == 1
        and all(other[name] == row[name] for name in ("experiment", "case", "checkpointing"))
        and row["gpus"] > 1
    ]
    for tokens, how in ((_tokens(row) / row["gpus"], "each"), (_tokens(row), "all")):
        rates = [other["tokens_per_s"] for other in alone if _tokens(other) == tokens]
        if rates:
            return row["tokens_per_s"] / row["gpus"] / max(rates), how
    return None


def picture(machine: str, rows: Sequence[Row], path: Path) -> None:
    """Draw how many times one GPU's rate several have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    plane = figure.add_subplot()
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        found = None if row["experiment"] == "links" else efficiency(row, rows)
        if found is not None:
            part, how = found
            tokens = thousands(round(_tokens(row) / (row["gpus"] if how == "each" else 1)))
            kind = "".join(letter for letter in row["mesh"] if letter.isalpha())
            label = f"{row['case']}, {kind}, {tokens} tokens for {how}"
            points = series.setdefault(label, {1: 1.0})
            points[row["gpus"]] = max(part * row["gpus"], points.get(row["gpus"], 0))
    most = max((max(points) for points in series.values()), default=1)
    plane.plot([1, most], [1, most], color="#9ca3af", lw=1.3, ls=(0, (4, 3)), label="as many times")
    for label, points in series.items():
        places = sorted(points)
        plane.plot(places, [points[place] for place in places], lw=1.8, marker="o", ms=4, label=label)
    plane.set(xlabel="GPUs", ylabel="times the tokens of one in a second", title=f"Several GPUs of {machine}")
    plane.legend(frameon=False, fontsize=8)
    plane.grid(alpha=0.25)
    plane.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _links(row: Row) -> str:
    latency = 1e3 * row["all_reduce_4k_ms"]
    return (
        f"On {row['gpus']} GPUs a copy within one moves {row['copy_gbps']:,} GB/s, an all-reduce of a gigabyte "
        f"{row['all_reduce_gbps']:,} GB/s on each link of a ring; one of 4 KiB takes {latency:.0f} µs."
    )


def _line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    found = efficiency(row, rows)
    memory = row.get("peak_gib")
    tokens = thousands(row["length"]) if row["batch"] == 1 else f"{row['batch']} × {thousands(row['length'])}"
    return (
        ", ".join([f"`{row['case']}`", *_settings(row)]),
        row["mesh"] if row["gpus"] > 1 else "",
        str(row["gpus"]),
        tokens,
        "" if row["chunk"] is None else thousands(row["chunk"]),
        f"{row['ms']:,.1f} ms",
        f"{row['tokens_per_s']:,}",
        "" if found is None else f"{found[0]:.2f} (as many for {found[1]})",
        "" if memory is None else f"{memory:.1f} GiB",
        f"{row['sent_bytes'] / 1e6:,.1f} MB" if row["gpus"] > 1 and "sent_bytes" in row else "",
    )


def _settings(row: Row) -> list[str]:
    told = {
        "checkpointing": row["checkpointing"] is True,
        "weights sent once": row["weights"] == "gathered",
        "whole weights": row["weights"] == "copies",
        "CUDA graph": row["graph"] is True,
    }
    return [name for name, holds in told.items() if holds]


def _tokens(row: Row) -> int:
    return row["batch"] * row["length"]


def _order(row: Row) -> tuple[Any, ...]:
    return row["experiment"] != "scan", row["case"], row["mesh"], row["gpus"], _tokens(row)
