"""Experiments that have been run: two steps of a tiny model for every mixer of each group."""

import contextlib
import io
from pathlib import Path

import pytest

from experiments.plan import Run, read
from experiments.record import Record, keep, read_records
from ssmscan import cli

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").glob("*.yaml"))

SHORT = {
    "steps": 2,
    "batch_size": 2,
    "micro_batch_size": None,
    "eval_every": 1,
    "eval_tokens": 1,
    "log_every": 1,
    "target": None,
    "device": "cpu",
    "precision": "float32",
    "cuda_graph": False,
    "compile": False,
}
SMALL = {
    "selective_copying": {"task.length": 64},
    "induction_heads": {"task.length": 64, "task.test_lengths": [16, 32], "task.test_examples": 2},
    "copying": {"model.layers": 1, "model.hidden_size": 16, "task.length": 8, "task.data_tokens": 2},
    "associative_recall": {"task.pairs": 2, "task.length": 8},
    "books_sweep": {"task.length": 16, "model.hidden_size": 32, "model.layers": 6},
    "books": {"task.length": 16, "model.hidden_size": 32, "model.layers": 6},
}


def shrink(run: Run, books: Path) -> None:
    """Make ``run`` one of a second or less."""
    group = run.name.split("/")[0]
    run.options |= SHORT | SMALL[group]
    if group.startswith("books"):
        run.options["task.data"] = str(books)
        recipe = (ROOT / "recipes" / f"{run.recipe}.yaml").read_text(encoding="utf-8")
        heads = {"attention": {"num_heads": 2}, "mamba2": {"headdim": 16, "d_state": 16}}
        used = {mixer: given for mixer, given in heads.items() if mixer in recipe.split("mixers:")[1].split("\n")[0]}
        run.options["model.mixer_options"] = used


@pytest.fixture(scope="session")
def books(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "verse.txt").write_text("to be or not to be, that is the question\n" * 99, encoding="utf-8")
    files = [part for name in ("data", "valid", "test") for part in (f"--{name}", str(folder / "verse.txt"))]
    assert cli.main(["tokenize", *files, "--vocab", "300", "--out", str(folder / "books")]) == 0
    return folder / "books"


@pytest.fixture(scope="session")
def records(tmp_path_factory, books) -> list[Record]:
    """Of the first run of every mixer in a group, and of one that failed."""
    folder, models = tmp_path_factory.mktemp("experiments"), set()
    for run in read(FILES, folder / "runs"):
        model = (run.name.split("/")[0], run.recipe, run.options.get("model.mixers"))
        if model in models:
            continue
        models.add(model)
        shrink(run, books)
        run.settle()
        while (command := run.next_command()) is not None:
            arguments, output = command
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                assert cli.main(arguments) == 0, run.name
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(told.getvalue(), encoding="utf-8")
        run.status = "finished"
        about = {"status": "finished", "error": None, "commit": "0123456", "date": "2026-11-27"}
        keep(run.folder, folder / "records" / run.name, about)
    failed = {"status": "failed", "error": "out of memory", "commit": None, "date": "2026-11-26"}
    keep(folder / "runs" / "books" / "lost-0", folder / "records" / "books" / "lost-0", failed)
    return read_records(folder / "records")
