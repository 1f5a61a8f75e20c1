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
from torch import nn

from ssmscan.models import SSMForCausalLM, load_pretrained
from ssmscan.models.modeling import CausalLMOutputWithPast
from ssmscan.tasks import IGNORE, SelectiveCopying, Text
from ssmscan.training import (
    ModelConfig,
    OptimConfig,
    RunError,
    TrainConfig,
    UsageError,
    batches,
    checkpoint,
    loop,
    step,
    train,
)
from ssmscan.training.folder import LOCK, RUN_FILES
from ssmscan.training.optim import make_optimizer

TINY = TrainConfig(
    steps=20,
    batch_size=4,
    eval_every=10,
    eval_tokens=42,
    log_every=1,
    save_every=10,
    device="cpu",
    task=SelectiveCopying(symbols=3, data_tokens=2, length=5),
    model=ModelConfig(mixers="gated_ssm", layers=2, hidden_size=8, mixer_options={"gated_ssm": {"expand": 2}}),
    optim=OptimConfig(warmup=5),
)


def _log(folder):
    """The lines of a run's log, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu", "peak_gib")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


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
    lines = _log(folder)
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
    assert _log(tmp_path / "run") == _log(whole[0])
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
    assert _log(tmp_path / "run") == _log(whole[0])


def test_a_log_with_half_a_line_is_mended(whole, tmp_path):
    config = replace(TINY, out=str(tmp_path), steps=10)
    train(replace(config, overwrite=True))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"split": "train", "st')
    train(replace(config, steps=12), resume=True)
    assert [line["step"] for line in _log(tmp_path)] == [*range(1, 11), 10, 11, 12, 12]


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
    logs = [_log(tmp_path / str(micro)) for micro in (None, 2, 1)]
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
    for line, expected in zip(_log(tmp_path), _log(whole[0]), strict=True):
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
        ({"target": "accuracy > 1"}, "target must be a measure, >= or <=, and a number, .* got 'accuracy > 1'"),
        ({"target": "loss <= nan"}, "target must be a measure, >= or <=, and a number, .* got 'loss <= nan'"),
        ({"micro_batch_size": 5}, "micro_batch_size must divide batch_size = 64, got 5"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"save_minutes": 0}, "save_minutes must be positive, got 0"),
    ],
)
def test_config_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=f"train: {part.replace('^', '.')}"):
        TrainConfig(**keywords)


def test_checkpoints_hold_no_pickled_code(whole):
    """They are read with weights_only, which refuses anything but tensors and plain values."""
    training = torch.load(whole[0] / "checkpoints" / "step_00000020" / "training.pt", weights_only=True)
    assert set(training) == {"update", "random", "seconds"}
    assert checkpoint._fault(whole[0] / "checkpoints" / "step_00000020") is None


@pytest.fixture
def play(tmp_path):
    """A file of text."""
    path = tmp_path / "play.txt"
    path.write_text("KING:\nTo be, or not to be – that is the question.\n" * 20, encoding="utf-8")
    return path


def test_text_resumed_on_the_same_bits(play, tmp_path, monkeypatch):
    config = replace(
        TINY, task=Text(str(play), length=16), model=ModelConfig(mixers=["mamba", "gated_ssm"], hidden_size=8)
    )
    whole = train(replace(config, out=str(tmp_path / "whole")))
    assert whole.evaluation.keys() == {"loss", "accuracy", "bits_per_byte"}
    # A dash of three bytes in 50 characters.
    assert 0.9 < whole.evaluation["bits_per_byte"] / (whole.evaluation["loss"] / math.log(2)) < 1

    def save(*arguments):
        checkpoint_save(*arguments)
        raise KeyboardInterrupt

    checkpoint_save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, out=str(tmp_path / "run")))
    assert train(replace(config, out=str(tmp_path / "run")), resume=True).evaluation == whole.evaluation
    assert _log(tmp_path / "run") == _log(tmp_path / "whole")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_is_not_continued_on_another_text(play, tmp_path):
    # A name that a plot's title must not take for a formula.
    play = play.rename(tmp_path / "a$^$ play.txt")
    config = replace(TINY, out=str(tmp_path / "run"), task=Text(str(play), length=16), steps=1)
    train(config)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]
    assert written.pop("name") == "text"
    play.write_text(play.read_text(encoding="utf-8").replace("be", "do"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"text: data must have the SHA-256 \w+, got \w+\. Its content has changed"):
        train(replace(config, task=Text(**written), steps=2), resume=True)


def test_a_text_is_not_for_a_model_that_sees_its_end(play, tmp_path):
    hydra = ModelConfig(mixers="hydra", hidden_size=8, mixer_options={"hydra": {"headdim": 4}})
    config = replace(TINY, out=str(tmp_path / "run"), task=Text(str(play), length=16), model=hydra)
    with pytest.raises(UsageError, match="train: mixers must be causal for the task text, got hydra"):
        train(config)
    train(replace(config, task=TINY.task, steps=1))


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"layers": 1.5}, "model: layers must be an integer, got 1.5"),
        ({"layers": 1}, "model: layers must be at least 2, got 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"mixers": "mambo"}, "mixers must be of .*, got 'mambo'"),
        ({"mixer_options": {"mamba": {"d_stat": 3}}}, "mixer_options"),
    ],
)
def test_model_refusals(keywords, part):
    with pytest.raises(TypeError if "an integer" in part else ValueError, match=part):
        ModelConfig(**keywords)


def test_mixers_are_repeated_through_the_layers():
    hybrid = ModelConfig(["mamba2", "mamba2", "attention"], 7, mixer_options={"attention": {"num_heads": 2}}).build(5)
    assert hybrid.mixers == ["mamba2", "mamba2", "attention", "mamba2", "mamba2", "attention", "mamba2"]
    assert ModelConfig(mixers="s4d").build(5).mixers == ["s4d"]
    assert ModelConfig(mixers="s4d", layers=2).build(5).mixers == ["s4d", "s4d"]


def test_a_model_that_cannot_be_built_is_refused(tmp_path):
    """Where only a layer knows."""
    config = replace(TINY, out=str(tmp_path / "run"), model=ModelConfig(mixers="mamba2", hidden_size=8))
    with pytest.raises(UsageError, match="headdim"):
        train(config)
    assert not (tmp_path / "run").exists()
