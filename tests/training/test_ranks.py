"""Several processes as one run: the steps of one process, checkpoints for any number, and the end when one is gone."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmscan.models import SSMForCausalLM
from ssmscan.tasks import SelectiveCopying, Text
from ssmscan.training import MeshConfig, ModelConfig, OptimConfig, TrainConfig, UsageError, train
from ssmscan.training.ranks import Ranks, joined

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")

COPY = TrainConfig(
    steps=20,
    batch_size=4,
    eval_every=10,
    # Of a batch and a half, so one of two processes has nothing to do in the last.
    eval_tokens=60,
    log_every=1,
    save_every=5,
    keep=9,
    device="cpu",
    task=SelectiveCopying(symbols=3, data_tokens=2, length=5),
    model=ModelConfig(mixers=["gated_ssm", "attention"], hidden_size=8, mixer_options={"attention": {"num_heads": 2}}),
    optim=OptimConfig(warmup=5),
)
TEXT = "to be or not to be, that is the question\n<|endoftext|>\nwhether 'tis nobler\n<|endoftext|>\n" * 20


def _text(folder):
    return Text(str(folder / "text.txt"), length=15)


# A run by its name: what it changes of COPY, and the mesh that runs it.
def _runs(folder):
    return {
        2: {
            "dp": (COPY, MeshConfig(dp=2)),
            "micro": (
                replace(COPY, micro_batch_size=1, gradient_checkpointing=True, save_minutes=9.0),
                MeshConfig(dp=2),
            ),
            "chunk": (replace(COPY, chunk=4), MeshConfig(dp=2)),
            "cp": (COPY, MeshConfig(cp=2)),
            "packed cp": (replace(COPY, task=_text(folder)), MeshConfig(cp=2)),
            "float32": (COPY, MeshConfig(dp=2)),
            "one and two": (COPY, MeshConfig()),
        },
        4: {"two and four": (COPY, MeshConfig(cp=2))},
    }


@contextmanager
def _precision(name):
    """The dtype of weights that are made meanwhile."""
    torch.set_default_dtype(torch.float32 if name == "float32" else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _train(name, config, folder):
    out = Path(folder) / name
    with _precision(name):
        train(replace(config, out=str(out)), resume=(out / "config.yaml").exists())


def _worker(rank, ranks, folder, runs):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["SSMSCAN_CACHE"] = f"{folder}/cache"
    with (Path(folder) / f"{rank} of {ranks}.txt").open("w") as told:
        sys.stdout = sys.stderr = told
        try:
            torch.distributed.init_process_group("gloo", f"file://{folder}/group{ranks}", rank=rank, world_size=ranks)
            for name, (config, mesh) in runs.items():
                _train(name, replace(config, mesh=mesh), folder)
            torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=told)
            raise


def _spawn(ranks, folder, runs):
    """The runs, one after the other, on so many processes."""
    server = multiprocessing.get_context("forkserver")
    # Imported once, and not in each process.
    server.set_forkserver_preload(["ssmscan.training.loop", "torch.distributed.checkpoint", "matplotlib.figure"])
    started = [server.Process(target=_worker, args=(rank, ranks, str(folder), runs)) for rank in range(ranks)]
    for process in started:
        process.start()
    for rank, process in enumerate(started):
        process.join(300)
        assert process.exitcode == 0, (folder / f"{rank} of {ranks}.txt").read_text()


def _back(folder, name, other, step):
    """A copy of a run as it was at ``step``."""
    shutil.copytree(folder / name, folder / other)
    (folder / other / "metrics.json").unlink()
    for path in (folder / other / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of all runs; those of one process have "whole" before their names."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMSCAN_CACHE", str(folder / "cache"))
        for name in ("dp", "packed cp", "float32"):
            config, _ = _runs(folder)[2][name]
            with _precision(name):
                train(replace(config, out=str(folder / f"whole {name}")))
        _back(folder, "whole dp", "one and two", 5)
        _spawn(2, folder, _runs(folder)[2])
        _back(folder, "dp", "two and four", 10)
        _spawn(4, folder, _runs(folder)[4])
        _back(folder, "two and four", "four and one", 15)
        _train("four and one", COPY, folder)
    return folder


def _log(folder):
    """The lines of a run's log without what depends on the clock."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("dp", "dp"),
        ("micro", "dp"),
        ("chunk", "dp"),
        ("cp", "dp"),
        ("packed cp", "packed cp"),
        ("float32", "float32"),
        ("one and two", "dp"),
        ("two and four", "dp"),
        ("four and one", "dp"),
    ],
)
def test_a_run_is_that_of_one_process(ran, name, one):
    """Its weights, and all that was told of it; whatever the processes were, or became."""
    bound = 1e-5 if name == "float32" else 1e-10
    found, expected = (load_file(ran / folder / "model.safetensors") for folder in (name, f"whole {one}"))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert weight.dtype == (torch.float32 if name == "float32" else torch.float64)
        assert (found[key] - weight).abs().max().item() < bound, key
    lines, others = _log(ran / name), _log(ran / f"whole {one}")
    assert [(line["split"], line["step"]) for line in lines] == [(line["split"], line["step"]) for line in others]
    for line, other in zip(lines, others, strict=True):
        del line["split"], other["split"]
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_the_first_process_tells(ran):
    first, second = ((ran / f"{rank} of 2.txt").read_text() for rank in (0, 1))
    assert "step     20   loss" in first
    assert second == ""
    metrics = json.loads((ran / "dp" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["parameters"] == json.loads((ran / "whole dp" / "metrics.json").read_text())["parameters"]


def test_what_several_processes_leave(ran):
    left = {path.name for path in (ran / "dp").iterdir()}
    assert left == {path.name for path in (ran / "whole dp").iterdir()}
    assert {path.name for path in (ran / "dp" / "checkpoints" / "step_00000020").iterdir()} == {
        "manifest.json",
        "shards",
        "training.pt",
    }
    weights = SSMForCausalLM.from_pretrained(ran / "dp").state_dict()
    assert all(weights[name].shape == tensor.shape for name, tensor in load_file(ran / "dp/model.safetensors").items())


def _start(ranks, folder, *, steps, code=""):
    """So many processes as torchrun starts them, without its watch over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = f"{code}\nimport sys\nfrom ssmscan import cli\nsys.exit(cli.main())"
    recipe = [
        "train", "--out", str(folder), "--device", "cpu", "--steps", str(steps), "--save_every", "2",
        "--log_every", "1", "--batch_size", "2", "--eval_tokens", "5", "--task.length", "5", "--task.symbols", "3",
        "--task.data_tokens", "2", "--model.mixers", "gated_ssm", "--model.hidden_size", "8", "--mesh.timeout", "20",
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, *recipe],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


KILLED = """
import os, signal
from ssmscan.training.step import Step
call, calls = Step.__call__, []

def killed(*arguments):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)

Step.__call__ = killed
"""


def test_a_process_that_dies_ends_the_run(tmp_path):
    """In a line that says so, and how to go on; and one process goes on."""
    out = tmp_path / "run"
    first, second = _start(2, out, steps=6, code=KILLED)
    _, told = first.communicate(timeout=120)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1, told
    (line,) = (line for line in told.splitlines() if line.startswith("train:"))
    assert line.startswith("train: all processes must go on, got one that is gone (")
    assert line.endswith(f"Continue with torchrun … -m ssmscan train --resume {out}.")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    config = replace(
        COPY, steps=6, batch_size=2, save_every=2, eval_tokens=5, out=str(out), model=ModelConfig("gated_ssm", None, 8)
    )
    assert train(config, resume=True).steps == 6


NOT_FINITE = """
import os, torch
from ssmscan.models import SSMForCausalLM
forward, calls = SSMForCausalLM.forward, []

def spoiled(self, *arguments, **named):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        named["num_items_in_batch"] = torch.tensor(0.0)
    return forward(self, *arguments, **named)

SSMForCausalLM.forward = spoiled
"""


def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    """Before the update, and in every process, though one alone has it."""
    started = _start(2, tmp_path / "run", steps=6, code=NOT_FINITE)
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 1, told
        assert "train: loss must be finite, got " in told
        assert "at step 3. The update was not made" in told


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"mesh": MeshConfig(dp=2)}, {}, r"dp · cp · tp must be the 1 processes that were started, got 2 · 1 · 1"),
        ({"mesh": MeshConfig(cp=3)}, {"WORLD_SIZE": "4"}, "the 4 processes that were started, got 1 · 3 · 1"),
        ({"batch_size": 3}, {"WORLD_SIZE": "2"}, "batch_size must be a multiple of dp = 2, got 3"),
        ({"micro_batch_size": 4}, {"WORLD_SIZE": "2"}, "micro_batch_size must divide batch_size / dp = 2, got 4"),
        ({"precision": "float16"}, {"WORLD_SIZE": "2"}, "precision must not be float16 on several processes"),
        ({"chunk": 4, "mesh": MeshConfig(cp=2)}, {"WORLD_SIZE": "2"}, "chunk must be null where cp splits"),
    ],
)
def test_refusals(changes, environment, message, monkeypatch):
    for name, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), joined(replace(COPY, **changes)):
        pass


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssmscan.training.mesh", None)
    with joined(COPY) as ranks:
        assert type(ranks) is Ranks
