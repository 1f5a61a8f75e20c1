"""preset: the sizes of the published models, counted without memory for them, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch

from ssmscan.models import PRESETS, SSMConfig, SSMForCausalLM, preset
from ssmscan.models.checkpoints import state_spaces_layout
from ssmscan.models.mixers import mixer_arguments

# Parameters in millions, with tied embeddings.
PUBLISHED = {
    "mamba-130m": 129.1,
    "mamba-370m": 371.5,
    "mamba-790m": 793.2,
    "mamba-1.4b": 1372.2,
    "mamba-2.8b": 2768.3,
    "mamba2-130m": 129.0,
    "mamba2-370m": 368.3,
    "mamba2-780m": 780.2,
    "mamba2-1.3b": 1343.8,
    "mamba2-2.7b": 2702.6,
}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def _millions(config):
    with torch.device("meta"):
        model = SSMForCausalLM(config)
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def _table():
    """The presets' rows of the page: name, layers, width, parameters in millions."""
    rows = re.findall(
        r"^\| `([\w.-]+)` \| (\d+) \| (\d+) \| ([\d.]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: (int(layers), int(width), float(millions)) for name, layers, width, millions in rows}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name):
    """As published, and as the page says."""
    config = preset(name)
    millions = _millions(config)
    assert millions == PUBLISHED.get(name, millions)
    assert _table()[name] == (config.num_hidden_layers, config.hidden_size, millions)


def test_the_page_has_every_preset():
    assert tuple(_table()) == PRESETS


def test_transformers_are_of_the_size_of_their_mamba2():
    for name in PRESETS:
        if name.startswith("transformer"):
            other = _table()[name.replace("transformer", "mamba2")]
            assert _table()[name][2] == pytest.approx(other[2], rel=0.06)


def test_the_default_config_is_a_preset():
    assert preset("mamba2-130m") == SSMConfig()


def test_hybrids():
    config = preset("mamba2-130m", attention_every=6)
    assert [i for i, mixer in enumerate(config.mixers) if mixer == "attention"] == [5, 11, 17, 23]
    assert set(config.mixers) == {"mamba2", "attention"}
    published = preset("mamba2attn-2.7b")
    assert [i for i, mixer in enumerate(published.mixers) if mixer == "attention"] == [9, 18, 27, 36, 45, 56]


def test_fields():
    config = preset("mamba-130m", vocab_size=100, tie_word_embeddings=False)
    assert (config.vocab_size, config.tie_word_embeddings, config.num_hidden_layers) == (100, False, 24)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"name": "mamba-1b"}, r"name must be of mamba-130m, .*, got 'mamba-1b'"),
        ({"name": "mamba-130m", "attention_every": 1}, "attention_every must be 2 to the 24 layers, got 1"),
        ({"name": "mamba-130m", "attention_every": 2.0}, r"attention_every must be 2 to the 24 layers, got 2\.0"),
        ({"name": "transformer-130m", "attention_every": 2}, "attention_every must be of a preset without attention"),
    ],
)
def test_refusals(arguments, part):
    with pytest.raises(ValueError, match=f"^preset: {part}"):
        preset(**arguments)


COMMON = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
FILES = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8},
    "mamba2-130m": {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
    "mamba2attn-2.7b": {
        "d_model": 2560,
        "d_intermediate": 0,
        "n_layer": 64,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 128,
            "num_heads": 30,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 64,
        },
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
}


@pytest.mark.parametrize("name", list(FILES))
def test_presets_are_what_published_files_say(name):
    file, config = SSMConfig(**state_spaces_layout.read_config(FILES[name] | COMMON)), preset(name)
    for mixer in set(config.mixers):
        assert mixer_arguments(mixer, file) == mixer_arguments(mixer, config)
    file.mixer_options = config.mixer_options
    assert file == config
