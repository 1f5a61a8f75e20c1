"""SSMConfig: what it refuses, what it derives, and that it survives a file."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig

from ssmscan.models import SSMConfig


@pytest.mark.parametrize(
    ("fields", "kind", "part"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": True}, TypeError, "vocab_size must be an integer, got True"),
        ({"hidden_size": 8.0}, TypeError, r"hidden_size must be an integer, got 8\.0"),
        ({"intermediate_size": -1}, ValueError, "intermediate_size must be at least 0, got -1"),
        ({"norm_groups": 0}, ValueError, "norm_groups must be at least 1, got 0"),
        ({"norm_eps": 0.0}, ValueError, r"norm_eps must be positive and finite, got 0\.0"),
        ({"norm_eps": "1e-5"}, TypeError, "norm_eps must be a number, got '1e-5'"),
        ({"initializer_range": float("inf")}, ValueError, "initializer_range must be positive and finite, got inf"),
        ({"residual_in_fp32": 1}, TypeError, "residual_in_fp32 must be true or false, got 1"),
        ({"mixers": "mamba"}, TypeError, r"mixers must be a list of names, got 'mamba'\. One name for each layer"),
        ({"mixers": []}, ValueError, "mixers must name at least one layer's mixer, got none"),
        ({"mixers": ["mamba", "mamba3"]}, ValueError, "mixers must be of gated_ssm, .*, got 'mamba3'"),
        ({"mixers": [1.5]}, ValueError, r"mixers must be of .*, got 1\.5"),
        ({"mixer_options": [1]}, TypeError, "mixer_options must be a dict"),
        (
            {"mixer_options": {"mamba": {}}},
            ValueError,
            "mixer_options must be for mixers .*, got 'mamba'",
        ),
        (
            {"mixer_options": {"mamba2": {"dstate": 4}}},
            ValueError,
            "mixer_options of mamba2 must be .*'dstate'",
        ),
        ({"mixer_options": {"mamba2": {"d_model": 4}}}, ValueError, "mixer_options of mamba2 must be of .*'d_model'"),
        ({"mixer_options": {"mamba2": 4}}, TypeError, "mixer_options of mamba2 must be a dict, got 4"),
        ({"mixers": ["attention"]}, ValueError, "mixer_options of attention must give num_heads, got none"),
        ({"layers": 1.5}, ValueError, "every keyword must be a field, got layers. The fields: vocab_size, hidden_size"),
        ({"num_hidden_layers": 2}, ValueError, "every keyword must be a field, got num_hidden_layers"),
        ({"layer_types": ["mamba"]}, ValueError, "every keyword must be a field, got layer_types"),
    ],
)
def test_refusals(fields, kind, part):
    with pytest.raises(kind, match=f"^SSMConfig: {part}"):
        SSMConfig(**fields)


def test_layer_types(small_config):
    config = small_config()
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize("load", [SSMConfig.from_pretrained, AutoConfig.from_pretrained])
def test_round_trip(load, small_config, tmp_path):
    """Also of what JSON has no form for."""
    config = small_config(
        ("mamba2",),
        mixer_options={"mamba2": {"dt_limit": (0.0, float("inf")), "headdim": 4}},
        norm_groups=2,
        eos_token_id=3,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is SSMConfig
    assert loaded.mixer_options["mamba2"]["dt_limit"] == [0.0, float("inf")]
    loaded.transformers_version = config.transformers_version
    assert loaded == config
    assert loaded != small_config()


def test_copies(small_config):
    config = small_config()
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_defaults_are_not_shared():
    first, second = SSMConfig(), SSMConfig()
    first.mixers.append("mamba")
    first.mixer_options["mamba"] = {}
    assert second.num_hidden_layers == 24
    assert second.mixer_options == {}
