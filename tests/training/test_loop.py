"""The training loop: what a run leaves, resuming bit for bit, and the ways to fail."""

import json
import signal
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

from ssmscan.models import LanguageModel, LanguageModelConfig
from ssmscan.tasks import IGNORE, SelectiveCopying
from ssmscan.training import OptimConfig, RunError, TaskConfig, TrainConfig, UsageError, checkpoint, loop, train
from ssmscan.training.folder import LOCK, RUN_FILES
from ssmscan.training.optim import make_optimizer

TINY = TrainConfig(
    steps=20,
    batch_size=4,
    eval_every=10,
    eval_examples=6,
    log_every=1,
    save_every=10,
    device="cpu",
    task=TaskConfig(symbols=3, data_tokens=2, length=5),
    model=LanguageModelConfig(hidden_size=8, layers=2, state_size_mult=2),
    optim=OptimConfig(warmup=5),
)


def _log(folder):
    """The lines of a run's log, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(replace(TINY, out=str(folder)))


def test_what_a_run_leaves(whole):
    folder, metrics = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted((*RUN_FILES, LOCK))
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000010", "step_00000020"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    written = json.loads((folder / "metrics.json").read_text())
    assert written["accuracy"] == metrics.accuracy
    assert written["steps"] == 20
    assert written["versions"]["torch"] == torch.__version__
    lines = _log(folder)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 21))
    assert [line["step"] for line in lines if line["split"] == "eval"] == [10, 20]
    assert lines[-1]["accuracy"] == metrics.accuracy

    model = LanguageModel(TINY.task.build().vocab_size, TINY.model)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert loop.evaluate(model, TINY.task.build(), TINY, 20, torch.device("cpu")) == (metrics.loss, metrics.accuracy)


def test_the_written_config_is_the_run(whole):
    folder, _ = whole
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["optim"]["betas"] == [0.9, 0.95]
    assert written["task"] == {"name": "selective_copying", "symbols": 3, "data_tokens": 2, "length": 5}
    assert written["out"] == str(folder)


def test_killed_while_saving_and_resumed(whole, tmp_path):
    """10 steps, a kill inside the save of step 20, and 10 steps more give the bits of 20 steps."""
    driver = f"""
import os, signal
from ssmscan.models import LanguageModelConfig
from ssmscan.training.folder import LOCK, RUN_FILES
from ssmscan.training.optim import make_optimizer
from ssmscan.training import OptimConfig, TaskConfig, TrainConfig, checkpoint, train

write = checkpoint._write_manifest

def killed(folder, step):
    if step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, step)

checkpoint._write_manifest = killed
train({replace(TINY, out=str(tmp_path / "run"))!r})
"""
    process = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_00000010", "unfinished_00000020"]

    train(replace(TINY, out=str(tmp_path / "run")), resume=True)
    assert _log(tmp_path / "run") == _log(whole[0])
    for name in ("model.safetensors", "checkpoints/step_00000020/training.pt"):
        ours, theirs = tmp_path / "run" / name, whole[0] / name
        if name.endswith(".pt"):
            ours, theirs = (torch.load(path, weights_only=True)["optimizer"] for path in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "run" / "checkpoints" / "unfinished_00000020").exists()


def test_resumes_from_the_one_before_a_broken_checkpoint(whole, tmp_path):
    config = replace(TINY, out=str(tmp_path / "run"), save_every=5, keep=3)
    train(config)
    newest = tmp_path / "run" / "checkpoints" / "step_00000020" / "model.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="step_00000020 is broken"):
        train(config, resume=True)
    assert _log(tmp_path / "run") == _log(whole[0])


def test_a_log_with_half_a_line_is_mended(whole, tmp_path):
    config = replace(TINY, out=str(tmp_path), steps=10)
    train(replace(config, overwrite=True))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"split": "train", "st')
    train(replace(config, steps=12), resume=True)
    assert [line["step"] for line in _log(tmp_path)] == [*range(1, 11), 10, 11, 12, 12]


def test_every_evaluation_has_examples_of_its_own(tmp_path, monkeypatch):
    seen = []
    batch = SelectiveCopying.batch

    def recorded(task, size, seed, index, split):
        made = batch(task, size, seed, index, split)
        if split == "eval":
            seen.extend(map(tuple, made.tokens.tolist()))
        return made

    monkeypatch.setattr(SelectiveCopying, "batch", recorded)
    train(replace(TINY, out=str(tmp_path), task=TaskConfig(length=20), steps=6, eval_every=2, eval_examples=10))
    # Three evaluations of 10, and the example that is shown at the end.
    assert len(set(seen)) == len(seen) == 3 * 10 + 1


def test_an_evaluation_counts_each_answer_once():
    """Also where the last batch is smaller than the others."""
    task, config = TINY.task.build(), replace(TINY, batch_size=4, eval_examples=6)
    # Whatever it reads, it says symbol 1, more or less surely: right in a third of the answers.
    model = nn.Embedding.from_pretrained(torch.tensor([0.3, 1.1, 0.2, -1.0, 0.4]).repeat(task.vocab_size, 1))
    batches = [task.batch(size, config.seed, 2 * 7 + i, "eval") for i, size in enumerate((4, 2))]
    targets = torch.cat([batch.targets for batch in batches]).flatten()
    logits = model(torch.cat([batch.tokens for batch in batches])).flatten(0, 1)
    asked = targets != IGNORE
    loss, accuracy = loop.evaluate(model, task, config, 7, torch.device("cpu"))
    assert loss == pytest.approx(F.cross_entropy(logits[asked], targets[asked]).item(), rel=1e-6)
    assert accuracy == pytest.approx((logits.argmax(-1) == targets)[asked].float().mean().item(), rel=1e-6)


def test_long_gradients_are_clipped(whole, tmp_path, monkeypatch):
    """To the length asked for; short ones are left as they are, and the log tells the length before."""
    clip = statistics.median(line["grad_norm"] for line in _log(whole[0]) if line["split"] == "train")
    norms = []

    def watched(*arguments):
        optimizer = make_optimizer(*arguments)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in parameters]).item())
        )
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", watched)
    train(replace(TINY, out=str(tmp_path), optim=replace(TINY.optim, clip=clip)))
    logged = [line["grad_norm"] for line in _log(tmp_path) if line["split"] == "train"]
    assert min(logged) < clip < max(logged)
    assert norms == pytest.approx([min(norm, clip) for norm in logged], rel=1e-5)


def test_stops_when_the_target_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda model, task, config, step, device: (1.0, 0.1 * step))
    metrics = train(replace(TINY, out=str(tmp_path), eval_every=3, target_accuracy=0.5))
    assert metrics.steps == 6
    assert metrics.accuracy == pytest.approx(0.6)


def test_fails_when_the_target_is_not_reached(tmp_path):
    with pytest.raises(RunError, match=r"train: accuracy must reach 1, got 0\.\d+ after 20 steps"):
        train(replace(TINY, out=str(tmp_path), target_accuracy=1.0))
    assert json.loads((tmp_path / "metrics.json").read_text())["target_accuracy"] == 1.0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_before_a_non_finite_update(tmp_path, monkeypatch, what):
    weights = []
    loss_of = loop._loss

    def spoiled(logits, targets):
        loss = loss_of(logits, targets)
        if len(weights) < 2 or not loss.requires_grad:
            return loss
        if what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    class Recorded(LanguageModel):
        def forward(self, *arguments):
            if self.training:
                weights.append((self, self.head.weight.detach().clone()))
            return super().forward(*arguments)

    monkeypatch.setattr(loop, "_loss", spoiled)
    monkeypatch.setattr(loop, "LanguageModel", Recorded)
    with pytest.raises(RunError, match=r"must be finite, got .* at step 2\. The update was not made"):
        train(replace(TINY, out=str(tmp_path)))
    model, before = weights[1]
    assert torch.equal(model.head.weight, before)
    assert not (tmp_path / "metrics.json").exists()


def test_a_taken_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="out must be an empty folder or a run's"):
            train(replace(TINY, out=str(tmp_path), overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path):
    config = replace(TINY, out=str(tmp_path), steps=1)
    train(config)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"out must be a new folder, got .*, which holds a run"):
        train(config)
    train(replace(config, overwrite=True, steps=2))
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"out": ""}, "out must name a folder, got ''"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer, got 1.5"),
        ({"batch_size": "8"}, "batch_size must be an integer, got '8'"),
        ({"keep": True}, "keep must be an integer, got True"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, "seed must be 0 to 2^63 - 1, got 9223372036854775808"),
        ({"target_accuracy": 1.5}, r"target_accuracy must be in \(0, 1\], got 1.5"),
    ],
)
def test_config_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=f"train: {part.replace('^', '.')}"):
        TrainConfig(**keywords)


def test_checkpoints_hold_no_pickled_code(whole):
    """They are read with weights_only, which refuses anything but tensors and plain values."""
    training = torch.load(whole[0] / "checkpoints" / "step_00000020" / "training.pt", weights_only=True)
    assert set(training) == {"optimizer", "random", "seconds"}
    assert checkpoint._fault(whole[0] / "checkpoints" / "step_00000020") is None
