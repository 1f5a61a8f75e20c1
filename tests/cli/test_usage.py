"""The command: exit statuses, one line on stderr, nothing written by what is refused."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssmscan_main
from ssmscan import cli
from ssmscan.tasks import TASKS


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", 'expected "subcommand" to be one of {train,generate,eval,tokenize,bench, ...}'),
        ("tarin", "invalid choice: 'tarin'"),
        ("train --optim.lr fast", "optim.lr must be float, got fast"),
        ("train --optim.lr -1", "optim: lr must be positive and finite, got -1.0"),
        ("train --optim.rate 1", "ssmscan: arguments must be among those of --help, got --optim.rate 1."),
        ("train --optim fast", "ssmscan: optim must be options or a YAML file of them, got fast."),
        ("train --steps 1.5", "steps must be int, got 1.5"),
        (
            "train --target high",
            "train: target must be a measure, >= or <=, and a number, as in accuracy >= 0.99, got 'high'",
        ),
        (
            "train --target skill>=1",
            "train: target must be of what the task selective_copying measures: loss, accuracy, got",
        ),
        ("train --wandb mine", "train: wandb must be installed, got none."),
        ("train --model.layers 1.5", "model.layers must be int or null, got 1.5."),
        ("train --model.mixers mambo", "SSMConfig: mixers must be of gated_ssm,"),
        ("train --model.mixers mamba2 --model.hidden_size 8", "Mamba2: "),
        ("train --task.name text", "task.data"),
        (
            "train --task.name text --task.data absent.txt",
            "text: data must name files, got absent.txt, which matches none.",
        ),
        ("train --task.name sorting", f"train: task.name must be one of {', '.join(TASKS)}, got sorting."),
        ("train --task.length 4", "selective_copying: data_tokens must be 1 to length = 4, got 8"),
        ("train --config absent.yaml", "train: --config must name a YAML file, got absent.yaml: No such file"),
        ("train --config=absent.yaml", "train: --config must name a YAML file, got absent.yaml: No such file"),
        ("train --config .", "train: --config must name a YAML file, got .: Is a directory."),
        (
            "train --config empty.yaml",
            "train: --config must hold options, as in steps: 100, got nothing in empty.yaml.",
        ),
        ("train --config list.yaml", "train: --config must hold options, as in steps: 100, got [3] in list.yaml."),
        ("train --config latin1.yaml", "train: --config must be UTF-8, got latin1.yaml."),
        (
            "train --config wrong_key.yaml",
            "train: options must be among those of ssmscan train --task.name NAME --help, got stepz.",
        ),
        (
            "train --config wrong_task.yaml",
            "train: --config must map the options of task to values, got 'filename' in wrong_task.yaml.",
        ),
        (
            "train --config no_mesh.yaml",
            "train: --config must map the options of mesh to values, got None in no_mesh.yaml.",
        ),
        ("train --config wrong_value.yaml", "steps must be int, got many"),
        ("train --config wrong_yaml.yaml", "train: --config must be YAML, got wrong_yaml.yaml: while parsing"),
        ("train --resume absent", "train: --resume must name a run's folder, got absent"),
        (
            "train --resume absent --steps 3",
            "train: --resume must be the only option, or come with --mesh, got --steps.",
        ),
        (
            "train --resume absent --steps 2000",
            "train: --resume must be the only option, or come with --mesh, got --steps.",
        ),
        (
            "train --optim.lr 2e-3 --resume=absent",
            "train: --resume must be the only option, or come with --mesh, got --optim.lr.",
        ),
        ("train --res absent", "arguments must be among those of --help, got --res absent."),
        ("train --out tiny.yaml", "train: out must be a folder, got the file tiny.yaml"),
        ("train --out .", "train: out must be an empty folder or a run's"),
        ("train --out tiny.yaml/run", "train: out must be a folder that can be written, got tiny.yaml/run"),
    ],
)
def test_wrong_usage(here, capsys, arguments, part):
    Path("wrong_key.yaml").write_text("stepz: 3")
    Path("wrong_task.yaml").write_text("task: filename")
    Path("no_mesh.yaml").write_text("mesh:")
    Path("wrong_value.yaml").write_text("steps: many")
    Path("wrong_yaml.yaml").write_text("optim: {lr: [")
    Path("empty.yaml").write_text("")
    Path("list.yaml").write_text("[3]")
    Path("latin1.yaml").write_bytes("# für\nsteps: 3".encode("latin-1"))
    before = sorted(here.rglob("*"))
    assert cli.main(shlex.split(arguments)) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the CUDA device that is to be missing")
def test_a_missing_device(here, capsys):
    assert cli.main(["train", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "train: device must be one of this machine, got cuda. Use --device cpu.\n"
    assert not Path("runs").exists()


def test_a_graph_without_cuda(here, capsys):
    assert cli.main(["train", "--device", "cpu", "--cuda_graph", "true"]) == 2
    assert capsys.readouterr().err == "train: cuda_graph must be false without CUDA, got true.\n"
    assert not Path("runs").exists()


def test_help_tells_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["train", "--help"])
    assert status.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "between two evaluations (steps). (type: int, default: 100)" in out
    assert "--optim.lr LR peak learning rate. (type: float, default: 0.002)" in out


@pytest.mark.parametrize("task", TASKS)
def test_groups_of_the_help_are_named_in_words(capsys, task):
    with pytest.raises(SystemExit):
        cli.main(["train", "--task.name", task, "--help"])
    headings = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.MULTILINE)
    assert len(headings) == 6
    assert all(re.fullmatch(r"[A-Za-z ,:]+", heading) for heading in headings), headings
    assert "the shape of the model" in headings


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "linear_scan" in out


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "matplotlib") else name)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        "ssmscan: matplotlib, rich must be installed, got none. Run pip install 'ssmscan[train]'.\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_interrupted_while_importing():
    code = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
import ssmscan_main
sys.exit(ssmscan_main.main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130
    assert result.stderr == "ssmscan: interrupted.\n"


def test_the_entry_point_runs_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssmscan", "tarin"])
    assert ssmscan_main.main() == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


def test_bench_refuses_on_one_line(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "no_such_op"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "OP must be one of" in err
    assert not list(here.glob("benchmarks"))
