"""The command ``ssmscan eval``."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ssmscan.shapes import error

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def eval_parser() -> ArgumentParser:
    """The parser of ``ssmscan eval``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Measure how well a model foretells a text; or, with lm-eval, its tasks.",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="folder of a run or of a model, or its name on the hub"
    )
    parser.add_argument(
        "--data", type=str, nargs="+", default=[], metavar="PATH", help="files of text, or a folder of tokens"
    )
    parser.add_argument("--part", type=str, default="eval", help="of a folder of tokens")
    parser.add_argument("--length", type=int, default=2048, help="of a window, the most that a token is foretold from")
    parser.add_argument(
        "--stride", type=int | None, default=None, help="from one window to the next (default: its length)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    parser.add_argument("--harness", type=str, nargs="+", default=[], metavar="TASK", help="tasks of lm-eval")
    return parser


def run(values: Namespace) -> None:
    """Print what the parsed ``values`` ask for."""
    if bool(values.data) == bool(values.harness):
        got = "both" if values.data else "none"
        raise ValueError(error("eval", "one of --data and --harness must be given", got))
    if values.harness:
        _harness(values)
        return
    measured = _measured(values)
    if values.json:
        print(json.dumps(measured))
        return
    told = [f"{name.replace('_', ' ')} {measured[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte")]
    told.append(f"accuracy {measured['accuracy']:.4f}")
    print("   ".join([*told, f"{measured['tokens']:,} tokens", f"{measured['tokens_per_second']:,.0f} tokens/s"]))


def _measured(values: Namespace) -> dict[str, float]:
    from rich.console import Console
    from rich.progress import Progress

    from ssmscan.generation.command import load
    from ssmscan.tasks.text import Corpus, find, tokenize
    from ssmscan.tasks.text.shards import INDEX
    from ssmscan.training.evaluation import evaluate_text

    model, _ = load(values.model, "eval")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(values.data[0])
        if len(values.data) > 1 or not (folder / INDEX).is_file():
            folder = Path(temporary) / "tokens"
            tokenize(folder, {"eval": find("--data", values.data)}, values.model)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            shown = bar.add_task("windows")
            return evaluate_text(
                model,
                Corpus(folder),
                values.part,
                values.length,
                values.stride,
                values.batch_size,
                lambda done, of: bar.update(shown, completed=done, total=of),
            )


def _harness(values: Namespace) -> None:
    if find_spec("lm_eval") is None:
        raise ValueError(error("eval", "lm-eval must be installed for --harness", "none", "Run pip install lm-eval."))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    from ssmscan.generation.command import load

    model, tokenizer = load(values.model, "eval")
    wrapped = HFLM(model, tokenizer=tokenizer, batch_size=values.batch_size)
    results = lm_eval.simple_evaluate(wrapped, tasks=values.harness)
    print(json.dumps(results["results"]) if values.json else make_table(results))
