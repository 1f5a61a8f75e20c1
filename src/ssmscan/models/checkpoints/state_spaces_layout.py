"""The layout of the state-spaces checkpoints: Mamba, Mamba-2, and either with attention, with or without MLPs.

Parameters have our names, but for the embedding. The config has the arguments of the classes of the papers' code, most
of which are also ours.
"""

from collections.abc import Mapping
from typing import Any

from ssmscan.models.checkpoints.refusal import require
from ssmscan.models.configuration import SSMConfig
from ssmscan.models.mixers import mixer_arguments
from ssmscan.shapes import error

_MIXERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}

# Arguments of theirs of which we have one value only.
_THEIRS: dict[str, dict[str, Any]] = {
    "mamba": {"dt_init": "random", "dt_scale": 1.0},
    "mamba2": {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None, "conv_init": None},
    "attention": {"mlp_dim": 0, "softmax_scale": None, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None},
}
# Arguments of theirs that say how to compute, not what.
_IMMATERIAL = ("use_fast_path", "use_mem_eff_path", "chunk_size", "sequence_parallel")
# Arguments of ours of which they have one value only.
_OURS: dict[str, dict[str, Any]] = {
    "mamba": {"bcdt_rms_eps": None},
    "mamba2": {"norm_eps": 1e-5, "causal": True},
    "attention": {"window": None, "causal": True},
}
# What attention takes to be there where the config says nothing, other than here.
_ATTENTION = {"causal": False, "qkv_proj_bias": True, "out_proj_bias": True, "rotary_emb_dim": 0}
_MODEL = {"rms_norm": True}
# The width of an MLP is rounded up to a multiple of this.
_MLP_MULTIPLE = 128

# Parameters with another name there than here.
NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this layout."""
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our config, from theirs."""
    require("load_pretrained", config, _MODEL)
    ssm = dict(config.get("ssm_cfg", {}))
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _MIXERS:
        raise NotImplementedError(error("load_pretrained", f"layer must be of {', '.join(_MIXERS)}", repr(layer)))
    mixer = _MIXERS[layer]
    attention = config.get("attn_layer_idx", [])
    options = {mixer: _read_options(mixer, ssm)}
    if attention:
        options["attention"] = _read_options("attention", _ATTENTION | config.get("attn_cfg", {}))
    multiple, width = config.get("pad_vocab_size_multiple", 8), config.get("d_intermediate", 0)
    return {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": config["d_model"],
        "mixers": ["attention" if i in attention else mixer for i in range(config["n_layer"])],
        "mixer_options": {name: given for name, given in options.items() if given},
        "intermediate_size": -(-width // _MLP_MULTIPLE) * _MLP_MULTIPLE,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }


def _read_options(mixer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    require("load_pretrained", given, _THEIRS[mixer])
    return {key: value for key, value in given.items() if key not in _THEIRS[mixer] and key not in _IMMATERIAL}


def write_config(config: SSMConfig) -> dict[str, Any]:
    """Their config, from ours; what theirs has no word for is refused."""
    kinds = set(config.mixers) - {"attention"}
    if len(kinds) > 1 or not kinds <= set(_MIXERS.values()):
        rule = "mixers must be mamba or mamba2, with or without attention"
        raise NotImplementedError(error("export_pretrained", rule, ", ".join(sorted(set(config.mixers)))))
    require("export_pretrained", {"norm_eps": config.norm_eps}, {"norm_eps": 1e-5})
    if config.intermediate_size % _MLP_MULTIPLE:
        rule = f"intermediate_size must be a multiple of {_MLP_MULTIPLE}"
        raise NotImplementedError(error("export_pretrained", rule, config.intermediate_size))
    mixer = kinds.pop() if kinds else "mamba2"
    layer = next(theirs for theirs, ours in _MIXERS.items() if ours == mixer)
    attention = [i for i, name in enumerate(config.mixers) if name == "attention"]
    return {
        "d_model": config.hidden_size,
        "d_intermediate": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer} | (_write_options(mixer, config) if mixer in config.mixers else {}),
        "attn_layer_idx": attention,
        "attn_cfg": _write_options("attention", config) | {"causal": True} if attention else {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _write_options(mixer: str, config: SSMConfig) -> dict[str, Any]:
    arguments = mixer_arguments(mixer, config)
    require("export_pretrained", arguments, _OURS[mixer])
    if mixer == "mamba2":
        groups = arguments.pop("norm_groups")
        if groups not in (None, arguments["ngroups"]):
            rule = f"norm_groups must be ngroups = {arguments['ngroups']}"
            raise NotImplementedError(error("export_pretrained", rule, groups))
    if mixer == "attention":
        heads, width = arguments["num_heads"], config.hidden_size
        arguments["head_dim"] = arguments["head_dim"] or width // heads
        arguments["num_heads_kv"] = arguments["num_heads_kv"] or heads
        if arguments["rotary_emb_dim"] is None:
            arguments["rotary_emb_dim"] = arguments["head_dim"]
    return {key: value for key, value in arguments.items() if key not in _OURS[mixer]}
