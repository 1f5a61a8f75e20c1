"""The results in Markdown: the table in README.md, and all of them in docs/benchmarks.md."""

from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from typing import Any

from ssmscan.bench.compare import Other, Pair, headlines, machine_of, pairs
from ssmscan.bench.report import NAMES, axes, mib, origin
from ssmscan.bench.result import DIRECTIONS, HEADLINE, SWEEP, Result, Row
from ssmscan.shapes import error

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"


def insert(text: str, content: str) -> str:
    """``text`` with ``content`` between its two markers. ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        got = f"{text.count(BEGIN)} and {text.count(END)}"
        raise ValueError(error("insert", f"text must hold {BEGIN} and, after it, {END}, once each", got))
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def short(results: Sequence[Result], others: Mapping[str, Sequence[Other]]) -> str:
    """README's: the headlines of one machine beside the best of the others, and their picture."""
    gpu = machine_of(results, others)
    here = [result for result in results if result.gpu == gpu]
    theirs = others.get(gpu, ())
    sources = "; ".join(dict.fromkeys(other.source for other in theirs))
    beside = f" The others' times: {sources}; a dash where none was measured." if sources else ""
    return "\n\n".join(
        [
            _comparison(headlines(pairs(here, theirs)), bool(theirs)),
            f"One {gpu.upper()}; {_origins(here)}. Of two numbers the first is of the forward alone.{beside}",
            f"![Times over the floor on {gpu.upper()}](docs/images/headlines-{gpu}.png)",
        ]
    )


def full(
    results: Sequence[Result],
    others: Mapping[str, Sequence[Other]],
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """All results, README's machine first: operations, the others' times, the host's time, models, and pictures.

    ``models`` and ``figures`` are the rows of each machine's models.json and figures.json.
    """
    parts = []
    first = machine_of(results, others)
    for gpu in sorted({result.gpu for result in results}, key=lambda name: (name != first, name == "cpu", name)):
        here = [result for result in results if result.gpu == gpu]
        parts += [f"## {gpu.upper()}", _operations(here), "\n".join(f"- {r.op}: {origin(r)}." for r in here)]
        compared = [pair for pair in pairs(here, others.get(gpu, ())) if pair.best]
        if compared:
            sources = dict.fromkeys(other.source for pair in compared for other in pair.best.values())
            parts += [
                f"### Beside other libraries on {gpu.upper()}",
                f"The best of those that were measured at the same work. Theirs: {'; '.join(sources)}.",
                _comparison(compared, True),
            ]
        hosts = [result for result in here if result.host_us is not None]
        if hosts:
            parts += [f"### Host time on {gpu.upper()}", _HOST, _host(hosts)]
        if gpu in models:
            parts += [f"### Whole models on {gpu.upper()}", _MODELS, _steps(models[gpu])]
            generated = [row for row in models[gpu] if row["direction"] == "generate"]
            parts += [f"### Generating on {gpu.upper()}", _GENERATING, _continuations(generated)] if generated else []
        if gpu in figures:
            pictures = dict.fromkeys(row["figure"] for row in figures[gpu])
            parts += [
                f"### The papers' figures on {gpu.upper()}",
                _FIGURES,
                "\n".join(f"![{name}](images/{name}-{gpu}.png)" for name in pictures),
            ]
        parts += [
            f"### Time over length on {gpu.upper()}",
            "At a constant number of tokens; dashed lines are the floors.",
            "\n".join(f"![{r.op}](images/{r.op}-{gpu}.png)" for r in here),
        ]
    return "\n\n".join(parts)


_HOST = (
    "What a tiny call in eager mode keeps the host busy, in µs, with gradients of all floating inputs in the second "
    "number, and how many times that of PyTorch's `scaled_dot_product_attention` in the same run it is."
)
_MODELS = (
    "As `ssmscan bench models` measures them. Training is a step under bfloat16 autocast, from the forward to AdamW's "
    "update, or its forward and loss alone; a prompt is read with weights in bfloat16, up to the scores of the next "
    "token; `blocks` is a forward and backward of 24 layers' operations. A step as one CUDA graph takes what the "
    "device takes; the host's time is that of launching a short step."
)
_GENERATING = (
    "`Generator`, weights in bfloat16, the likeliest token each time. The first rate is that of the tokens after the "
    "first, the second that of the whole call with its prompt. Its tokens were compared with those of `generate` first."
)
_FIGURES = (
    "Each number beside a line's end is how many times longer than `selective_scan` it takes there. [How they are "
    "measured](kernels.md#whole-models)."
)
_STEPS = {
    "train": "training",
    "fwdbwd": "forward + backward",
    "forward": "training, forward alone",
    "prefill": "reading a prompt",
}


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], align: str) -> str:
    """A table; ``align`` has one letter for each column, "l" or "r"."""
    rule = ["---:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _operations(results: Sequence[Result]) -> str:
    lines = [
        (
            _operation(row, result),
            axes(row.shape),
            row.dtype,
            NAMES[row.direction],
            _ms(row.median_ms),
            _ms(row.floor_ms),
            digits(row.ratio_to_floor),
            mib(row),
        )
        for result in results
        for row in result.rows
        if row.variant != SWEEP
    ]
    header = ("operation", "shape", "dtype", "direction", "time", "floor", "time / floor", "memory")
    return _table(header, lines, "llllrrrr")


def _operation(row: Row, result: Result) -> str:
    remarks = [] if row.variant == HEADLINE else [row.variant]
    # The backends after the first are there to compare with.
    remarks += [] if row.backend == result.rows[0].backend else [f'backend="{row.backend}"']
    return f"`{row.op}`" + (f" ({'; '.join(remarks)})" if remarks else "")


def _comparison(found: Sequence[Pair], others: bool) -> str:
    header = ("operation", "shape", *NAMES.values(), "× floor")
    lines = [
        (
            f"`{pair.row.op}`" + ("" if pair.row.variant == HEADLINE else f" ({pair.row.variant})"),
            axes(pair.row.shape),
            *(_ms(pair.rows[direction].median_ms) for direction in DIRECTIONS),
            _both(digits(pair.rows[direction].ratio_to_floor) for direction in DIRECTIONS),
        )
        for pair in found
    ]
    if not others:
        return _table(header, lines, "llrrr")
    header = (*header, "× as fast as the best public kernel", "which")
    best = [
        (_both(f"{pair.speedup(direction):.2f}" for direction in DIRECTIONS), pair.best["fwd"].name)
        if pair.best
        else ("–", "–")
        for pair in found
    ]
    return _table(header, [(*line, *other) for line, other in zip(lines, best, strict=True)], "llrrrrl")


def _both(numbers: Iterable[str]) -> str:
    return " / ".join(numbers)


def _ms(time: float) -> str:
    return f"{digits(time)} ms"


def digits(value: float) -> str:
    """Three digits, or all of a whole number of more."""
    return f"{value:.{max(2 - floor(log10(value)), 0)}f}"


def _host(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        us = result.host_us
        assert us is not None
        lines.append(
            (
                f"`{result.op}`",
                *(f"{us[name]:.0f}" for name in DIRECTIONS),
                *(f"{us[f'sdpa {name}']:.0f}" for name in DIRECTIONS),
                _both(f"{us[name] / us[f'sdpa {name}']:.1f}" for name in DIRECTIONS),
            )
        )
    return _table(("operation", *NAMES.values(), "attention", "both ways", "× attention"), lines, "lrrrrr")


def _steps(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        (
            row["model"],
            _STEPS[row["direction"]],
            f"{row['batch']} × {row['length']}",
            row["mode"],
            *_measured(row, "tokens_per_s", "step_ms", "host_ms"),
            _origin_of(row),
        )
        for row in sorted(rows, key=_place)
        if row["direction"] in _STEPS
    ]
    header = ("model", "what", "batch × length", "mode", "tokens/s", "step", "host", "memory", "measured")
    return _table(header, lines, "llllrrrrl")


def _continuations(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        (
            row["model"],
            str(row["batch"]),
            f"{row['length']} + {row['new_tokens']}",
            *_measured(row, "tokens_per_s", "call_tokens_per_s", "step_ms", "host_ms", "prefill_ms"),
            _origin_of(row),
        )
        for row in sorted(rows, key=_place)
    ]
    header = (
        "model", "batch", "prompt + new", "tokens/s", "with the prompt", "step", "host", "prompt", "memory", "measured"
    )  # fmt: skip
    return _table(header, lines, "lrrrrrrrrl")


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Several processes write one file, in no order."""
    return tuple(row[name] for name in ("model", "direction", "batch", "length", "mode"))


def _measured(row: Mapping[str, Any], *names: str) -> list[str]:
    """Rates and times of a row, and its memory; or why there are none."""
    if "left_out" in row:
        return [row["left_out"], *["–"] * len(names)]
    cells = [f"{row[name]:,}" if name.endswith("per_s") else _ms(row[name]) for name in names]
    return [*cells, "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"]


def _origin_of(row: Mapping[str, Any]) -> str:
    return f"{row['date'][:10]}, {row['commit']}"


def _origins(results: Sequence[Result]) -> str:
    """What a machine's results have in common, and when they were measured."""
    dates = sorted({result.date[:10] for result in results})
    commits = dict.fromkeys(result.commit for result in results)
    versions = dict.fromkeys(f"torch {r.torch}" + (f", triton {r.triton}" if r.triton else "") for r in results)
    return (
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}; {', '.join(versions)}; "
        f"{', '.join(dict.fromkeys(result.rows[0].dtype for result in results))}"
    )
