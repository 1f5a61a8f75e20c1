"""The experiments' files, what is kept of their runs, and the page that is made of it."""

import json
import sys
from pathlib import Path

import pytest

from experiments import report
from experiments.plan import read
from experiments.record import LINES, keep, thinned, training
from ssmscan.training.options import train_config, train_parser
from ssmscan.training.report import read_log

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "experiments.md"

PLAN = """
first:
  recipe: demo
  seeds: [0, 1]
  slots: 2
  options: {steps: 4, optim.lr: 1.0e-3}
  runs:
    a: {}
    b: {recipe: copying, optim.lr: 2.0e-3}
second:
  recipe: demo
  evaluate: [test]
  runs:
    c: {optim.lr: {best_of: first/*, times: 0.5}, steps: {best_of: first/a-*}}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return read([tmp_path / "plan.yaml"], tmp_path / "runs")


def _ended(run, loss):
    run.status = "finished"
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").write_text(json.dumps({"evaluation": {"loss": loss}}))


def test_a_file_lists_runs(plan):
    assert [run.name for run in plan] == ["first/a-0", "first/a-1", "first/b-0", "first/b-1", "second/c-0"]
    assert [run.recipe for run in plan] == ["demo", "demo", "copying", "copying", "demo"]
    assert [run.slots for run in plan] == [2, 2, 2, 2, 1]
    assert plan[2].options == {"steps": 4, "optim.lr": 2e-3}
    assert plan[4].waits_for == plan[:4]
    assert all(not run.waits_for for run in plan[:4])


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_list_runs_that_are_valid(file, tmp_path):
    for run in read([file], tmp_path):
        for other in run.waits_for:
            other.status = "finished"
            other.folder.mkdir(parents=True, exist_ok=True)
            (other.folder / "metrics.json").write_text('{"evaluation": {"loss": 1}}')
        run.settle()
        (_, *arguments), _ = run.next_command()
        parser = train_parser(arguments)
        config, resume = train_config(arguments, parser.instantiate(parser.parse_args(arguments)))
        assert not resume
        assert (config.seed, config.out) == (run.seed, str(run.folder))


def test_an_option_can_be_that_of_the_best(plan):
    for run, loss in zip(plan, (3.0, 2.0, 1.0), strict=False):
        _ended(run, loss)
    plan[2].options["steps"] = 9
    plan[3].status = "failed"
    plan[4].settle()
    assert plan[4].options == {"optim.lr": 1e-3, "steps": 4}


def test_there_must_be_a_best(plan):
    for run in plan[:4]:
        run.status = "failed"
    with pytest.raises(ValueError, match=r"second/c-0: optim.lr must be that of a finished run, got none of first/\*"):
        plan[4].settle()


def test_a_run_s_commands(plan):
    run = plan[4]
    run.options = {"target": "loss <= 1", "task.data": ["a", "b"], "cuda_graph": True}
    (command, *arguments), output = run.next_command()
    assert command == "train"
    assert arguments[2:] == [
        *("--target", "loss <= 1", "--task.data", '["a", "b"]', "--cuda_graph", "true"),
        *("--seed", "0", "--out", str(run.folder)),
    ]
    assert output == run.folder.parent / "c-0.out"
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("task: {data: books, length: 32}")
    assert run.next_command()[0] == ["train", "--resume", str(run.folder)]
    (run.folder / "metrics.json").write_text("{}")
    (command, *arguments), output = run.next_command()
    assert command == "eval"
    assert arguments[2:] == ["--data", "books", "--length", "32", "--part", "test", "--json"]
    output.write_text("{}")
    assert run.next_command() is None


def _line(step, loss=1.0, split="train", **more):
    return {"split": split, "step": step, "loss": loss, "tokens_per_second": 10.0 * step, "grad_norm": 1.0} | more


def test_a_log_is_thinned():
    lines = [_line(step) for step in range(1, 3 * LINES)]
    lines[100:100] = [_line(100, split="eval"), _line(101, split="eval")]
    kept = thinned(lines)
    assert [line["step"] for line in kept if line["split"] == "eval"] == [100, 101]
    steps = [line["step"] for line in kept if line["split"] == "train"]
    assert LINES / 2 < len(steps) <= LINES
    assert steps[-1] == 3 * LINES - 1
    assert thinned(lines[:10]) == lines[:10]


def test_stability_is_told_of_the_whole_log():
    lines = [_line(step, 1.0 + 0.6 * (step == 30), grad_norm=9.0 if step < 5 else 1.0 + step) for step in range(1, 51)]
    assert training(lines) == {"tokens_per_second": 255.0, "max_grad_norm": 51.0, "spikes": 1}
    assert training([*lines, _line(51, peak_gib=2.0)])["peak_gib"] == 2.0
    assert training([]) == {}


def test_half_a_line_is_passed_over(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps(_line(1, 1 / 3)) + '\n{"split": "tr')
    keep(run, tmp_path / "record", {"status": "failed"})
    (line,) = read_log(tmp_path / "record")
    assert line["loss"] == 0.33333


def test_every_mixer_takes_steps_and_is_reported(records, tmp_path):
    page = report.write(records, PAGE.read_text(encoding="utf-8"), tmp_path)
    assert report.write(records, page, tmp_path) == page
    for record in records:
        assert f"[{record.group}/{record.folder.name}](../experiments/{record.group}/{record.folder.name})" in page
    for name in report.SECTIONS:
        section = page.split(f"<!-- results: {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        finished = [run for run in records if run.group == name and run.about["status"] == "finished"]
        assert all(f"`{run.kind.split('-')[name == 'copying']}`" in section for run in finished)
        assert (tmp_path / f"{name}.png").is_file() == (name != "books_sweep")
    assert "failed: out of memory" in page
    assert "| 0.0005 |" in page.split("<!-- results: books -->")[1]


def test_what_was_not_run_is_absent(records, tmp_path):
    empty = report.write([], PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "![" not in empty
    some = report.write([run for run in records if run.group == "copying"], empty, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["copying.png"]
    assert some.count("![") == 1
    with pytest.raises(ValueError, match="page must hold <!-- results: log -->"):
        report.insert("", "log", "")


def test_help_writes_no_page(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "--help"])
    monkeypatch.setattr(report, "write", lambda page, *_: pytest.fail("written"))
    with pytest.raises(SystemExit, match="0"):
        report.main()
    assert "docs/experiments.md" in capsys.readouterr().out


def test_own_records_are_printed(records, monkeypatch, capsys):
    """As a table that leads to them; a folder without any is refused."""
    folder = records[0].folder.parents[1]
    monkeypatch.setattr(report, "write", lambda page, *_: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(records)
    assert all(any(f"]({record.folder})" in line for line in lines) for record in records)
    monkeypatch.setattr(sys, "argv", ["report", str(folder / "books")])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert f"RECORDS must be a folder that experiments.run has recorded runs in, got {folder / 'books'}." in (
        capsys.readouterr().err
    )


def test_the_page_shows_what_is_recorded(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    assert report.write(report.read_records(ROOT / "experiments"), page, tmp_path) == page, (
        "run python -m experiments.report"
    )
