"""Runs on a text: resuming bit for bit, and what is refused."""

import math
from dataclasses import replace

import pytest
import yaml
from tiny_runs import TINY, log_of

from ssmscan.tasks import Text
from ssmscan.training import (
    ModelConfig,
    UsageError,
    checkpoint,
    train,
)


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
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
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
