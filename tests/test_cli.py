"""The command: exit statuses, one line on stderr, nothing written by what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssmscan import cli
from ssmscan.training import checkpoint

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = """
steps: 4
batch_size: 2
eval_every: 2
eval_examples: 4
save_every: 2
device: cpu
task: {symbols: 3, data_tokens: 2, length: 5}
model: {hidden_size: 4, layers: 1, state_size_mult: 1}
optim: {warmup: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a tiny recipe."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def test_trains(here, capsys):
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--optim.lr", "1e-3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "answer    " in out
    assert "accuracy 0." in out
    assert "after 4 steps" in out
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
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--target_accuracy", "1.0"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train: accuracy must reach 1, got 0.")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", 'expected "subcommand" to be one of {train,bench,info}'),
        ("tarin", "invalid choice: 'tarin'"),
        ("train --optim.lr fast", "optim.lr must be float, got fast"),
        ("train --optim.lr -1", "optim: lr must be positive and finite, got -1.0"),
        ("train --optim.rate 1", "unrecognized arguments: --optim.rate"),
        ("train --steps 1.5", "steps must be int, got 1.5"),
        ("train --task.name sorting", "task.name must be one of 'copying', 'selective_copying', got sorting"),
        ("train --task.length 4", "selective_copying: data_tokens must be 1 to length = 4, got 8"),
        ("train --config absent.yaml", "absent.yaml"),
        ("train --config wrong_key.yaml", "does not accept option 'stepz'"),
        ("train --config wrong_value.yaml", "steps must be int, got many"),
        ("train --config wrong_yaml.yaml", "parsing"),
        ("train --resume absent", "train: --resume must name a run's folder, got absent"),
        ("train --resume absent --steps 3", "train: --resume must be the only option"),
        ("train --out tiny.yaml", "train: out must be a folder, got the file tiny.yaml"),
        ("train --out .", "train: out must be an empty folder or a run's"),
        ("train --out tiny.yaml/run", "train: out must be a folder that can be written, got tiny.yaml/run"),
    ],
)
def test_wrong_usage(here, capsys, arguments, part):
    Path("wrong_key.yaml").write_text("stepz: 3")
    Path("wrong_value.yaml").write_text("steps: many")
    Path("wrong_yaml.yaml").write_text("optim: {lr: [")
    before = sorted(here.rglob("*"))
    assert cli.main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the CUDA device that is to be missing")
def test_a_missing_device(here, capsys):
    assert cli.main(["train", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "train: device must be one of this machine, got cuda. Use --device cpu.\n"
    assert not Path("runs").exists()


def test_help_tells_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["train", "--help"])
    assert status.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "between two evaluations (steps). (type: int, default: 100)" in out
    assert "--optim.lr LR peak learning rate. (type: float, default: 0.002)" in out


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "linear_scan" in out


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "matplotlib") else name)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        "ssmscan: rich, matplotlib must be installed, got none. Run pip install 'ssmscan[train]'.\n"
    )


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    _, values = cli._parse(["train", "--config", str(recipe)])
    config, resume = cli._train_config(values)
    assert not resume
    assert config.out == f"runs/{recipe.stem}"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_interrupted_by_the_keyboard(here):
    """A signal in the midst of training: exit status 130, one line, and a run that can be resumed."""
    command = [sys.executable, "-m", "ssmscan.cli", "train", "--config", "tiny.yaml", "--out", "run"]
    process = subprocess.Popen([*command, "--steps", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(here.glob("run/checkpoints/step_*")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "train: interrupted. Continue with ssmscan train --resume run.\n"
    assert not list(here.glob("run/checkpoints/unfinished_*"))


def test_bench_refuses_on_one_line(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "no_such_op"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "OP must be one of" in err
    assert not list(here.glob("benchmarks"))
