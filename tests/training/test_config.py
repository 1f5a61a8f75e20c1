"""What the config of a run refuses, and the model that it asks for."""

import pytest

from ssmscan.training import (
    ModelConfig,
    TrainConfig,
)


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
