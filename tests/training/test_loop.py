"""The training loop: what a run leaves, resuming bit for bit, and the ways to fail."""

import json
import math
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_runs import TINY, log_of
from torch import nn

from ssmscan.models import SSMForCausalLM, load_pretrained
from ssmscan.models.modeling import CausalLMOutputWithPast
from ssmscan.tasks import IGNORE, SelectiveCopying
from ssmscan.training import (
    ModelConfig,
    RunError,
    UsageError,
    batches,
    checkpoint,
    loop,
    step,
    train,
)
from ssmscan.training.folder import LOCK, RUN_FILES
from ssmscan.training.optim import make_optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(replace(TINY, out=str(folder)))


def test_what_a_run_leaves(whole):
    folder, metrics = whole
    left = {path.name for path in folder.iterdir()}
    assert left == {*RUN_FILES, LOCK} - {"tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000010", "step_00000020"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    written = json.loads((folder / "metrics.json").read_text())
    assert written["evaluation"] == metrics.evaluation
    assert metrics.evaluation.keys() == {"loss", "accuracy"}
    assert written["steps"] == 20
    assert written["versions"]["torch"] == torch.__version__
    lines = log_of(folder)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 21))
    assert [line["step"] for line in lines if line["split"] == "eval"] == [10, 20]
    assert lines[-1]["accuracy"] == metrics.evaluation["accuracy"]


@pytest.mark.parametrize("part", ["", "checkpoints/step_00000020"])
def test_the_model_that_a_run_leaves(whole, part):
    folder, metrics = whole
    model = load_pretrained(folder / part)
    assert loop.evaluate(model, TINY) == metrics.evaluation


def test_the_written_config_is_the_run(whole):
    folder, _ = whole
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["optim"]["betas"] == [0.9, 0.95]
    sizes = {"symbols": 3, "data_tokens": 2, "length": 5, "shortest": None}
    assert written["task"] == {"name": "selective_copying", **sizes}
    assert written["out"] == str(folder)


def test_killed_while_saving_and_resumed(whole, tmp_path):
    """10 steps, a kill inside the save of step 20, and 10 steps more give the bits of 20 steps."""
    driver = f"""
import os, signal
from ssmscan.tasks import SelectiveCopying
from ssmscan.training import MeshConfig, ModelConfig, OptimConfig, TrainConfig, checkpoint, train

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
    assert log_of(tmp_path / "run") == log_of(whole[0])
    for name in ("model.safetensors", "checkpoints/step_00000020/training.pt"):
        ours, theirs = tmp_path / "run" / name, whole[0] / name
        if name.endswith(".pt"):
            ours, theirs = (torch.load(path, weights_only=True)["update"] for path in (ours, theirs))
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
    assert log_of(tmp_path / "run") == log_of(whole[0])


def test_a_log_with_half_a_line_is_mended(whole, tmp_path):
    config = replace(TINY, out=str(tmp_path), steps=10)
    train(replace(config, overwrite=True))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"split": "train", "st')
    train(replace(config, steps=12), resume=True)
    assert [line["step"] for line in log_of(tmp_path)] == [*range(1, 11), 10, 11, 12, 12]


def test_evaluations_take_the_same_examples(tmp_path, monkeypatch):
    """As many whole ones as eval_tokens allow, and one where it allows none."""
    seen = []
    batch = SelectiveCopying.batch

    def recorded(task, size, seed, index, split):
        made = batch(task, size, seed, index, split)
        if split == "eval":
            seen.append((size, index))
        return made

    monkeypatch.setattr(SelectiveCopying, "batch", recorded)
    train(replace(TINY, out=str(tmp_path), steps=4, eval_every=2, eval_tokens=7 * 6))
    # Six examples in two batches of four, twice; and the example that is shown at the end.
    assert seen == [(4, 0), (4, 1)] * 2 + [(1, 0)]
    seen.clear()
    loop.evaluate(loop._prepare(TINY)[1], replace(TINY, eval_tokens=1, batch_size=2))
    assert seen == [(2, 0)]


def test_an_evaluation_counts_each_answer_once():
    """Also where the last batch is smaller than the others, and where there are fewer examples than asked for."""

    class Stubborn(nn.Module):
        """Whatever it reads, it says symbol 1, more or less surely: right in a third of the answers."""

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache=False):
            return CausalLMOutputWithPast(logits=torch.tensor([0.3, 1.1, 0.2, -1.0, 0.4]).expand(*input_ids.shape, 5))

    class Few(SelectiveCopying):
        held_out_examples = 5

    for task, examples in ((TINY.task, 6), (Few(symbols=3, data_tokens=2, length=5), 5)):
        batches = [task.batch(4, 0, i, "eval").rows(0, examples - 4 * i) for i in range(2)]
        targets = torch.cat([batch.targets for batch in batches]).flatten()
        targets = targets[targets != IGNORE]
        assert targets.numel() == 2 * examples
        logits = Stubborn()(targets).logits
        measures = loop.evaluate(Stubborn(), replace(TINY, task=task))
        assert measures["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
        assert measures["accuracy"] == pytest.approx((targets == 1).float().mean().item(), rel=1e-6)


def test_long_gradients_are_clipped(whole, tmp_path, monkeypatch):
    """To the length asked for; short ones are left as they are, and the log tells the length before."""
    clip = statistics.median(line["grad_norm"] for line in log_of(whole[0]) if line["split"] == "train")
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
    logged = [line["grad_norm"] for line in log_of(tmp_path) if line["split"] == "train"]
    assert min(logged) < clip < max(logged)
    assert norms == pytest.approx([min(norm, clip) for norm in logged], rel=1e-5)


@pytest.mark.parametrize(("target", "steps"), [("accuracy >= 0.5", 6), ("accuracy>=0.3", 3), ("loss <= 0.3", 3)])
def test_stops_when_the_target_is_reached(tmp_path, monkeypatch, target, steps):
    values = iter([0.3, 0.6, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda *_: dict.fromkeys(("loss", "accuracy"), next(values)))
    metrics = train(replace(TINY, out=str(tmp_path), eval_every=3, target=target))
    assert metrics.steps == steps


def test_fails_when_the_target_is_not_reached(tmp_path):
    with pytest.raises(RunError, match=r"train: accuracy must reach 1, got 0\.\d+ after 20 steps"):
        train(replace(TINY, out=str(tmp_path), target="accuracy >= 1"))
    assert json.loads((tmp_path / "metrics.json").read_text())["target"] == "accuracy >= 1"


def spoil(monkeypatch, what, at):
    """Make the model's loss or gradient infinite in its forward number ``at``; a list that gets its weights then."""
    forward, weights = SSMForCausalLM.forward, []

    def spoiled(model, *arguments, **keywords):
        output = forward(model, *arguments, **keywords)
        if output.loss is not None:
            weights.append([weight.detach().clone() for weight in model.parameters()])
            if len(weights) == at and what == "loss":
                output.loss = output.loss * float("nan")
            elif len(weights) == at:
                output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(SSMForCausalLM, "forward", spoiled)
    return weights


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, what, precision):
    """Nor does any after it, before the host has read of it; but in float16 an infinite gradient is passed over."""
    weights = spoil(monkeypatch, what, at=2)
    config, model = loop._prepare(replace(TINY, precision=precision))
    update = step.Step(model.train(), make_optimizer(model, config.optim), config, torch.device("cpu"))
    read = [update(TINY.task.batch(4, 0, i, "train"), 0.1).tolist() for i in range(4)]
    goes_on = (what, precision) == ("gradient", "float16")
    assert [halted for *_, halted in read] == [0, 0, 0, 0] if goes_on else [0, 1, 1, 1]
    assert [math.isfinite(loss) for loss, *_ in read] == [True, what != "loss", True, True]
    same = [all(map(torch.equal, before, after)) for before, after in pairwise(weights)]
    assert same == [False, True, not goes_on]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_before_a_non_finite_update(tmp_path, monkeypatch, what):
    weights = spoil(monkeypatch, what, at=6)
    with pytest.raises(RunError, match=r"must be finite, got .* at step 6\. The update was not made"):
        train(replace(TINY, out=str(tmp_path), save_every=5))
    assert not (tmp_path / "metrics.json").exists()
    # What can be continued is what was good.
    update = step.Step(model := loop._prepare(TINY)[1], make_optimizer(model, TINY.optim), TINY, torch.device("cpu"))
    assert checkpoint.load(tmp_path / "checkpoints", update)[0] == 5
    assert all(map(torch.equal, weights[5], model.parameters()))


def test_accumulation_changes_nothing_but_rounding(whole, tmp_path):
    """Also where the parts have unequal numbers of answers."""

    class Ragged(SelectiveCopying):
        def batch(self, size, seed, index, split):
            batch = super().batch(size, seed, index, split)
            batch.targets[0, -1] = IGNORE
            return batch

    task = Ragged(symbols=3, data_tokens=2, length=5)
    for micro in (None, 2, 1):
        train(replace(TINY, out=str(tmp_path / str(micro)), task=task, micro_batch_size=micro))
    logs = [log_of(tmp_path / str(micro)) for micro in (None, 2, 1)]
    for log in logs[1:]:
        for line, expected in zip(log, logs[0], strict=True):
            if line["split"] == "train":
                values = ("loss", "grad_norm")
                assert [line[name] for name in values] == pytest.approx([expected[name] for name in values], rel=2e-4)


def test_a_checkpoint_when_minutes_have_gone_by(tmp_path):
    train(replace(TINY, out=str(tmp_path), steps=3, save_every=100, save_minutes=1e-9, keep=9))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}])
def test_a_run_with(whole, tmp_path, options):
    train(replace(TINY, out=str(tmp_path), **options))
    for line, expected in zip(log_of(tmp_path), log_of(whole[0]), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5 if "precision" not in options else 2e-2)


def test_each_batch_is_made_once_and_in_order(monkeypatch):
    made = []
    monkeypatch.setattr(SelectiveCopying, "batch", lambda *arguments: made.append(arguments[3]) or arguments[3])
    assert list(batches.batches(replace(TINY, steps=6), 2)) == made == [2, 3, 4, 5]
    assert list(batches.batches(replace(TINY, steps=6), 6)) == []


def test_what_a_batch_cannot_be_made_of_ends_the_run(tmp_path, monkeypatch):
    def batch(*arguments):
        raise ValueError("text: data must be there, got nothing.")

    monkeypatch.setattr(SelectiveCopying, "batch", batch)
    with pytest.raises(ValueError, match="data must be there"):
        train(replace(TINY, out=str(tmp_path)))


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


def test_checkpoints_hold_no_pickled_code(whole):
    """They are read with weights_only, which refuses anything but tensors and plain values."""
    training = torch.load(whole[0] / "checkpoints" / "step_00000020" / "training.pt", weights_only=True)
    assert set(training) == {"update", "random", "seconds"}
    assert checkpoint._fault(whole[0] / "checkpoints" / "step_00000020") is None


def test_a_model_that_cannot_be_built_is_refused(tmp_path):
    """Where only a layer knows."""
    config = replace(TINY, out=str(tmp_path / "run"), model=ModelConfig(mixers="mamba2", hidden_size=8))
    with pytest.raises(UsageError, match="headdim"):
        train(config)
    assert not (tmp_path / "run").exists()
