"""``ssmscan train``: a run, its end, and how to go on from it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ssmscan import cli
from ssmscan.training import checkpoint


def test_trains(here, capsys):
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--optim.lr", "1e-3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "answer    " in out
    assert re.search(r"\nloss \d\.\d{4}, accuracy 0\.\d{4}; held out, after 4 steps", out)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 4
    assert "lr: 0.001\n" in Path("run/config.yaml").read_text()


def test_resumes(here, capsys, monkeypatch):
    save = checkpoint.save

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 130
    assert capsys.readouterr().err == "train: interrupted. Continue with ssmscan train --resume run.\n"
    Path("run").rename("moved")
    assert cli.main(["train", "--resume", "moved"]) == 0
    assert json.loads(Path("moved/metrics.json").read_text())["steps"] == 4
    assert not Path("run").exists()


def test_one_run_in_a_folder(here, capsys):
    """Neither a new run nor the same one resumed enters a folder in which a run is going on."""
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 0
    Path("run/metrics.json").unlink()
    before = sorted(Path("run").rglob("*"))
    capsys.readouterr()
    with FileLock("run/.lock"):
        for arguments in ("--resume run", "--config tiny.yaml --out run --overwrite true"):
            assert cli.main(["train", *arguments.split()]) == 2
            assert capsys.readouterr().err == (
                "train: out must be a folder of its own, got run, where a run is going on. Wait for it.\n"
            )
    assert sorted(Path("run").rglob("*")) == before
    assert cli.main(["train", "--resume", "run"]) == 0


@pytest.mark.filterwarnings("default")
def test_warns_of_a_broken_checkpoint_on_one_line(here, capsys):
    cli.main(["train", "--config", "tiny.yaml", "--out", "run"])
    Path("run/metrics.json").unlink()
    Path("run/checkpoints/step_00000004/manifest.json").write_text("{")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: checkpoint run/checkpoints/step_00000004 is broken")
    assert err.count("\n") == 1


def test_a_failed_run(here, capsys):
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--target", "accuracy >= 1.0"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train: accuracy must reach 1, got 0.")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_interrupted_by_the_keyboard(here, capsys):
    """A signal in the midst of training: exit status 130, one line, and a run that can be resumed."""
    command = [sys.executable, "-m", "ssmscan.cli", "train", "--config", "tiny.yaml", "--out", "run"]
    with subprocess.Popen(
        [*command, "--steps", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not list(here.glob("run/checkpoints/step_*")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            assert cli.main(["train", "--resume", "run"]) == 2
            assert "where a run is going on" in capsys.readouterr().err
        finally:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "train: interrupted. Continue with ssmscan train --resume run.\n"
    assert not list(here.glob("run/checkpoints/unfinished_*"))
