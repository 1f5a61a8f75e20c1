"""Several processes as one run: the steps of one process, checkpoints for any number, and the end when one is gone."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from ssmscan import cli
from ssmscan.models import SSMForCausalLM
from ssmscan.tasks import SelectiveCopying, Text
from ssmscan.training import MeshConfig, ModelConfig, OptimConfig, TrainConfig, UsageError, checkpoint, shards, train
from ssmscan.training.config import to_yaml
from ssmscan.training.step import Step

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
# Attention does not read packed sequences in chunks.
SCANS = ModelConfig(mixers=["gated_ssm", "mamba"], hidden_size=8, mixer_options={"mamba": {"d_state": 4}})
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
            "micro held": (replace(COPY, micro_batch_size=1), MeshConfig(dp=2, reshard=False)),
            "micro whole": (replace(COPY, micro_batch_size=1), MeshConfig(dp=2, shard=False)),
            # More at once than a process has.
            "chunk": (replace(COPY, chunk=4, micro_batch_size=4), MeshConfig(dp=2)),
            "cp": (COPY, MeshConfig(cp=2)),
            "packed cp": (replace(COPY, task=_text(folder), model=SCANS), MeshConfig(cp=2)),
            "chunk cp": (replace(COPY, chunk=4), MeshConfig(cp=2)),
            "chunk cp held": (replace(COPY, chunk=4), MeshConfig(cp=2, reshard=False)),
            "chunk cp whole": (replace(COPY, chunk=4), MeshConfig(cp=2, shard=False)),
            "packed chunk cp": (replace(COPY, task=_text(folder), chunk=17, model=SCANS), MeshConfig(cp=2)),
            "tp": (COPY, MeshConfig(tp=2)),
            "chunk tp": (replace(COPY, chunk=4), MeshConfig(tp=2)),
            "float32": (COPY, MeshConfig(dp=2)),
            "bfloat16": (replace(COPY, chunk=4, precision="bfloat16"), MeshConfig(dp=2)),
            "bfloat16 held": (replace(COPY, chunk=4, precision="bfloat16"), MeshConfig(dp=2, reshard=False)),
            "bfloat16 whole": (replace(COPY, chunk=4, precision="bfloat16"), MeshConfig(dp=2, shard=False)),
            "one and two": (COPY, MeshConfig()),
        },
        4: {
            "two and four": (COPY, MeshConfig(cp=2)),
            "one and tp": (COPY, MeshConfig(tp=2)),
            "whole and tp": (COPY, MeshConfig(tp=2, shard=False)),
            "whole and cp": (COPY, MeshConfig(cp=2, shard=False)),
            "whole and shares": (COPY, MeshConfig()),
        },
    }


@contextmanager
def _precision(name):
    """The dtype of weights that are made meanwhile."""
    torch.set_default_dtype(torch.float32 if name == "float32" or name.startswith("bfloat16") else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _train(name, config, folder):
    out = Path(folder) / name
    with _precision(name):
        train(replace(config, out=str(out)), resume=(out / "config.yaml").exists())


def _process(rank, ranks, folder, body, arguments):
    """One of several, which tells a file what it would tell a terminal."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["SSMSCAN_CACHE"] = f"{folder}/cache"
    warnings.simplefilter("ignore")
    with (folder / f"{rank} of {ranks}.txt").open("w", buffering=1) as told:
        sys.stdout = sys.stderr = told
        try:
            body(folder, *arguments)
        except Exception:
            traceback.print_exc()
            raise


def _start(ranks, folder, body, *arguments):
    """Runs ``body`` in so many processes; the exit status of each, and what it told."""
    server = multiprocessing.get_context("forkserver")
    # Imported once, and not in each process.
    server.set_forkserver_preload(["ssmscan.cli", "ssmscan.training.mesh", "ssmscan.training.shards"])
    started = [
        server.Process(target=_process, args=(rank, ranks, folder, body, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    told = [(folder / f"{rank} of {ranks}.txt").read_text() for rank in range(ranks)]
    return [process.exitcode for process in started], told


def _all(folder, runs):
    """The runs, one after the other, in one group."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", f"file://{folder}/group{ranks}", rank=rank, world_size=ranks)
    for name, (config, mesh) in runs.items():
        _train(name, replace(config, mesh=mesh), folder)
    torch.distributed.destroy_process_group()


def _run_all(ranks, folder):
    ended, told = _start(ranks, folder, _all, _runs(folder)[ranks])
    assert ended == [0] * ranks, told


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
        _run_all(2, folder)
        _back(folder, "dp", "two and four", 10)
        _back(folder, "whole dp", "one and tp", 10)
        for name in ("whole and tp", "whole and cp", "whole and shares"):
            _back(folder, "micro whole", name, 10)
        _run_all(4, folder)
        _back(folder, "two and four", "four and one", 15)
        _train("four and one", COPY, folder)
        _back(folder, "whole and tp", "whole and one", 15)
        _train("whole and one", COPY, folder)
        _back(folder, "one and tp", "tp and one", 15)
        _train("tp and one", COPY, folder)
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
        ("micro held", "dp"),
        ("micro whole", "dp"),
        ("chunk", "dp"),
        ("cp", "dp"),
        ("packed cp", "packed cp"),
        ("chunk cp", "dp"),
        ("chunk cp held", "dp"),
        ("chunk cp whole", "dp"),
        ("packed chunk cp", "packed cp"),
        ("tp", "dp"),
        ("chunk tp", "dp"),
        ("one and tp", "dp"),
        ("tp and one", "dp"),
        ("float32", "float32"),
        ("one and two", "dp"),
        ("two and four", "dp"),
        ("four and one", "dp"),
        ("whole and tp", "dp"),
        ("whole and cp", "dp"),
        ("whole and shares", "dp"),
        ("whole and one", "dp"),
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


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 held", "bfloat16 whole"])
def test_a_run_in_bfloat16(ran, name):
    """Weights that are read, or gathered, in bfloat16, and are float32."""
    found, expected = (load_file(ran / folder / "model.safetensors") for folder in (name, "whole float32"))
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    far = max((found[name] - weight).abs().max().item() for name, weight in expected.items())
    # Updates of Adam, each of the size of the learning rate whatever its gradient's.
    assert 1e-4 < far < 1e-2
    losses = ([line["loss"] for line in _log(ran / folder)] for folder in (name, "whole float32"))
    assert next(losses) == pytest.approx(next(losses), rel=5e-3)


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
    assert checkpoint.why_no_model(ran / "dp" / "checkpoints" / "step_00000020") == (
        "a run's checkpoints, in shards of several processes",
        f"Give {ran / 'dp'}, where the run has left its model.",
    )
    weights = SSMForCausalLM.from_pretrained(ran / "dp").state_dict()
    assert all(weights[name].shape == tensor.shape for name, tensor in load_file(ran / "dp/model.safetensors").items())


SMALL = replace(
    COPY, steps=6, batch_size=2, save_every=2, eval_tokens=5, model=ModelConfig("gated_ssm", None, 8),
    mesh=MeshConfig(timeout=20.0),
)  # fmt: skip


def _command(folder, port, spoil):
    """``ssmscan train`` as torchrun starts it, without torchrun's watch over the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if os.environ["RANK"] == "1":
        spoil()
    # A file of its own, for another process may be reading that one's.
    config = folder / f"run-{os.environ['RANK']}.yaml"
    config.write_text(to_yaml(replace(SMALL, out=str(folder / "run"))))
    sys.exit(cli.main(["train", "--config", str(config)]))


def _nothing():
    """Goes well."""


def _get_a_signal(number, step):
    """As that step begins."""
    steps, call = [], Step.__call__

    def signalled(*arguments):
        steps.append(None)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return call(*arguments)

    Step.__call__ = signalled


def _spoil_the_third_loss():
    calls, forward = [], SSMForCausalLM.forward

    def spoiled(*arguments, **named):
        calls.append(None)
        if len(calls) == 3:
            named["num_items_in_batch"] = torch.tensor(0.0)
        return forward(*arguments, **named)

    SSMForCausalLM.forward = spoiled


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_that_dies_ends_the_run(tmp_path):
    """In a line that says so, and how to go on; and one process goes on."""
    out = tmp_path / "run"
    ended, told = _start(2, tmp_path, _command, _free_port(), partial(_get_a_signal, signal.SIGKILL, 4))
    assert ended == [1, -signal.SIGKILL], told
    (line,) = (line for line in told[0].splitlines() if line.startswith("train:"))
    advice = f"Continue with torchrun … -m ssmscan train --resume {out}."
    assert line == f"train: all processes must go on, got one that is gone. {advice}"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert train(replace(SMALL, out=str(out)), resume=True).steps == 6


def test_a_process_that_is_told_to_end_ends_all(tmp_path):
    """After a checkpoint of the same step; the first process tells how to go on, as several."""
    ended, told = _start(2, tmp_path, _command, _free_port(), partial(_get_a_signal, signal.SIGTERM, 3))
    assert ended == [cli.TERMINATED] * 2, told
    command = f"torchrun … -m ssmscan train --resume {tmp_path / 'run'}"
    assert f"train: terminated, after a checkpoint. Continue with {command}.\n" in told[0]
    assert "train:" not in told[1]
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000003"]


def test_a_folder_that_is_taken_ends_all(tmp_path):
    """By what the first process says, and by no advice to continue another's run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(SMALL))
    ended, told = _start(2, tmp_path, _command, _free_port(), _nothing)
    assert ended == [2, 2], told
    assert "train: out must be a new folder, got " in told[0]
    assert told[1] == ""


def test_a_run_is_not_continued_by_another_model(tmp_path):
    """Several processes would read those weights of its checkpoint that have the same names."""
    config = replace(SMALL, out=str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UsageError, match=r"train: model must be that of .*, got \{'layers': 1\}"):
        train(replace(config, model=replace(config.model, layers=1)), resume=True)


def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    """Before the update, and in every process, though one alone has it."""
    ended, told = _start(2, tmp_path, _command, _free_port(), _spoil_the_third_loss)
    assert ended == [1, 1], told
    for text in told:
        assert "train: loss must be finite, got " in text
        assert "at step 3. The update was not made" in text


def test_what_fails_in_a_process_is_raised_in_all(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(*_, **__):
        raise CheckpointException("save", {1: (full, None)})

    monkeypatch.setattr(shards.dcp, "save", save)
    with pytest.raises(OSError, match="No space left") as raised:
        shards.save(tmp_path / "shards", SimpleNamespace(named={}))
    assert raised.value.filename == str(tmp_path / "shards")


def _recorded(folder, ports, device):
    """Runs in groups of their own, which end with them."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    config = replace(COPY, device=device, precision="float32", micro_batch_size=1, eval_tokens=24)
    meshes = {
        "shares": MeshConfig(),
        "whole": MeshConfig(shard=False),
        "tp": MeshConfig(tp=int(os.environ["WORLD_SIZE"])),
    }
    for port, (name, mesh) in zip(ports, meshes.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        graph = device == "cuda" and name != "shares"
        train(replace(config, out=str(folder / name), cuda_graph=graph, mesh=mesh))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_runs_in_groups_of_their_own(tmp_path, device):
    """On GPUs, two or as many as there are, a step is launched as one graph, with all that goes between them."""
    ranks = 2 if device == "cpu" else min(torch.cuda.device_count(), 2)
    ended, told = _start(ranks, tmp_path, _recorded, [_free_port() for _ in range(3)], device)
    assert ended == [0] * ranks, told
    expected = [line["loss"] for line in _log(tmp_path / "shares")]
    bound = 1e-5 if device == "cpu" else 1e-3
    for name in ("whole", "tp"):
        assert [line["loss"] for line in _log(tmp_path / name)] == pytest.approx(expected, rel=bound)
