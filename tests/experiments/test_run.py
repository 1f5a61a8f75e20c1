"""Running experiments: what runs where and when, and what a cut leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import run as running
from experiments.plan import read
from ssmscan import cli

ROOT = Path(__file__).parents[2]

PLAN = """
pairs:
  recipe: demo
  slots: 2
  runs: {a: {}, b: {optim.lr: -1}, c: {}}
alone:
  recipe: demo
  runs: {e: {}, d: {optim.lr: {best_of: pairs/*}}, f: {optim.lr: {best_of: pairs/b*}}}
"""


class Process:
    """What Popen makes: a training that ends after three looks, as its learning rate says."""

    started: list["Process"] = []  # noqa: RUF012

    def __init__(self, args, stdout, stderr, env, start_new_session):
        self.args, self.looks, self.returncode = args, 0, None
        self.name = "/".join(Path(args[-1]).parts[-2:])
        self.beside = [process.name for process in self.started if process.returncode is None]
        self.gpu, self.started_alone = env["CUDA_VISIBLE_DEVICES"], start_new_session
        self.stderr = Path(stderr.name)
        self.started.append(self)

    def poll(self):
        self.looks += 1
        if self.looks == 3:
            self.returncode = int("-1" in self.args)
            if self.returncode:
                self.stderr.write_text("warning: it is late\noptim: lr must be positive and finite, got -1.\n")
            else:
                folder = Path(self.args[-1])
                folder.mkdir(parents=True)
                (folder / "metrics.json").write_text('{"evaluation": {"loss": 1}}')
        return self.returncode


def _read(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return read([tmp_path / "plan.yaml"], tmp_path / "runs")


def test_runs_share_gpus_and_wait_for_others(tmp_path, monkeypatch):
    runs = _read(tmp_path)
    for run in runs[:3:2]:
        run.options["optim.lr"] = 1e-3
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.setattr(running.subprocess, "Popen", Process)
    running.work(runs, running.Machine(2, tmp_path / "records", "0123456"), minutes=1)
    # No room for e beside a, b and c, and what has waited for these comes before it.
    assert [(p.name, p.gpu, p.beside) for p in Process.started] == [
        ("pairs/a-0", "3", []),
        ("pairs/b-0", "5", ["pairs/a-0"]),
        ("pairs/c-0", "3", ["pairs/a-0", "pairs/b-0"]),
        ("alone/d-0", "3", []),
        ("alone/e-0", "5", ["alone/d-0"]),
    ]
    assert all(process.started_alone for process in Process.started)
    assert [run.status for run in runs] == ["finished", "failed", "finished", "finished", "finished", "failed"]
    errors = [json.loads(path.read_text())["error"] for path in sorted((tmp_path / "records").glob("*/*/record.json"))]
    none, refused = "got none of pairs/b*.", "optim: lr must be positive and finite, got -1."
    assert errors == [None, None, f"alone/f-0: optim.lr must be that of a finished run, {none}", None, refused, None]
    assert [run.status for run in _read(tmp_path)] == [run.status for run in runs]


def test_gpus_are_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert list(running.Machine(2, tmp_path, None).free) == ["3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list(running.Machine(2, tmp_path, None).free) == ["0", "1"]
    assert list(running.Machine(0, tmp_path, None).free) == [""]


def test_a_command_can_be_given_to_a_shell(tmp_path, monkeypatch, capsys):
    run = _read(tmp_path)[3]
    run.options["target"] = "accuracy >= 0.9"
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(running.subprocess, "Popen", Process)
    running.work([run], running.Machine(0, tmp_path / "records", None), minutes=1)
    assert " --target 'accuracy >= 0.9' " in capsys.readouterr().out


def test_a_pattern_must_match_a_run(tmp_path, monkeypatch, capsys):
    _read(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "plan.yaml"), "--only", "par/*"])
    with pytest.raises(SystemExit, match="2"):
        running.main()
    assert "--only must match a name, group/run-seed, of the files, got par/*." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "must map names to groups of runs, got None."),
        ("a: [", "must be YAML, got "),
        ("a: 3", "a: must be a group with runs, got 3."),
        ("a: {recipe: demo}", "a: must be a group with runs, got {'recipe': 'demo'}."),
        ("a: {runs: {x: {}}, option: {}}", "a: a group must have recipe, seeds, slots, options, evaluate, runs, "),
        ("a: {recipe: demo, runs: {x: }}", "a/x: must map options to values, got None."),
        ("a: {recipe: dem, runs: {x: {}}}", "got dem."),
        ("a: {runs: {x: {}}}", "got None."),
        ("a: {recipe: demo, seeds: 3, runs: {x: {}}}", "a: seeds must be a list, got 3."),
        ("a: {recipe: demo, seeds: [one], runs: {x: {}}}", "each of seeds must be an integer, got 'one'."),
        ("a: {recipe: demo, slots: 0, runs: {x: {}}}", "a: slots must be at least 1, got 0."),
        ("a: {recipe: demo, evaluate: eval, runs: {x: {}}}", "a: evaluate must be a list, got eval."),
        ("a: {recipe: demo, runs: {x: {optim.lr: {best_of: b/*}}}}", "an earlier run's name, group/run-seed, got b/*."),
        ("a: {recipe: demo, seeds: [0, 0], runs: {x: {}}}", "must name one run, got a/x-0 twice."),
    ],
)
def test_a_list_that_is_none(tmp_path, monkeypatch, capsys, plan, message):
    """Refused in one line, before anything runs."""
    path = tmp_path / "plan.yaml"
    path.write_text(plan)
    monkeypatch.setattr(sys, "argv", ["run", str(path), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="2"):
        running.main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in told
    assert message in told


def test_what_failed_is_told(tmp_path, monkeypatch, capsys):
    """At the end of every call; one that is tried again, and stopped, goes on without --again."""
    for run in _read(tmp_path):
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        run.beside(".json").write_text(json.dumps({"status": "failed" if run.name == "pairs/b-0" else "finished"}))
    folders = ["--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "plan.yaml"), *folders])
    with pytest.raises(SystemExit, match="1"):
        running.main()
    assert capsys.readouterr().out.endswith("6 of 6 runs have ended, 1 of them failed, which --again continues\n")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--again", "--minutes", "0"])
    running.main()
    assert capsys.readouterr().out.endswith("5 of 6 runs have ended\n")
    assert [run.name for run in _read(tmp_path) if run.status is None] == ["pairs/b-0"]


def test_one_that_waits_for_a_failure_has_its_turn(tmp_path):
    """Though nothing is running any more when that one is refused."""
    path = tmp_path / "plan.yaml"
    path.write_text(f"{PLAN}last: {{recipe: demo, runs: {{g: {{optim.lr: {{best_of: alone/f*}}}}}}}}\n")
    *others, first, last = read([path], tmp_path / "runs")
    for run in others:
        run.status = "failed"
    running.work([*others, first, last], running.Machine(0, tmp_path / "records", None), minutes=1)
    assert (first.status, last.status) == ("failed", "failed")


def test_gpus_cannot_be_fewer_than_none(tmp_path, monkeypatch, capsys):
    _read(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "plan.yaml"), "--gpus", "-1"])
    with pytest.raises(SystemExit, match="2"):
        running.main()
    assert "--gpus must be at least 0, got -1." in capsys.readouterr().err


def test_interrupted(tmp_path, monkeypatch, capsys):
    """The sum of what has ended, and no traceback."""

    def interrupted(machine):
        raise KeyboardInterrupt

    _read(tmp_path)
    monkeypatch.setattr(running.Machine, "advance", interrupted)
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "plan.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="130"):
        running.main()
    assert capsys.readouterr().out.endswith("0 of 6 runs have ended\n")


def test_what_others_wait_for_must_be_there(tmp_path, capsys):
    runs = _read(tmp_path)[4:5]
    running.work(runs, running.Machine(1, tmp_path / "records", None), minutes=1)
    assert runs[0].status is None
    assert "alone/d-0 waits for pairs/a-0, pairs/b-0, pairs/c-0\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_a_cut_changes_nothing(tmp_path, monkeypatch):
    """SIGTERM in the midst, then the same command again: the log and the model of a run never stopped."""
    monkeypatch.chdir(tmp_path)
    options = "steps: 400, batch_size: 2, eval_every: 100, eval_tokens: 64, log_every: 1, target: null, device: cpu"
    shape = "task.length: 8, task.data_tokens: 2, model.layers: 2, model.hidden_size: 16"
    Path("plan.yaml").write_text(
        f"tiny: {{recipe: demo, options: {{{options}, {shape}}}, runs: {{a: {{}}, b: {{steps: 2}}, c: {{steps: 0}}}}}}"
    )
    command = [sys.executable, "-m", "experiments.run", "plan.yaml", "--gpus", "0", "--records", "kept"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT))), "OMP_NUM_THREADS": "1"}
    log = Path("runs/tiny/a-0/log.jsonl")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (log.is_file() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not Path("kept").exists()
    assert len(list(Path("runs/tiny/a-0/checkpoints").iterdir())) == 1
    # For c, of no steps, fails.
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 1
    # Once more there is nothing to do, but to record what there is.
    shutil.rmtree("kept")
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=60).returncode == 1
    status = {path.parent.name: json.loads(path.read_text())["status"] for path in Path("kept").glob("*/*/record.json")}
    assert status == {"a-0": "finished", "b-0": "finished", "c-0": "failed"}

    assert cli.main(["train", "--config", "kept/tiny/a-0/config.yaml", "--out", "whole"]) == 0
    assert Path("whole/model.safetensors").read_bytes() == Path("runs/tiny/a-0/model.safetensors").read_bytes()
    assert _log(Path("whole/log.jsonl")) == _log(log)


def _log(path):
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "tokens_per_second")}
        for line in path.read_text().splitlines()
    ]
