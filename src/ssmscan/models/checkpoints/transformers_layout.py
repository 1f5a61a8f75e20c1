"""The layout of transformers' own mamba, mamba2 and falcon_mamba, whose parameters have our names."""

import json
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ssmscan.models.checkpoints.refusal import require
from ssmscan.models.configuration import SSMConfig
from ssmscan.models.mixers import mixer_arguments
from ssmscan.shapes import error

# The model's fields: theirs and ours.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# A mixer's: theirs and ours.
_BOTH = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
_MAMBA = _BOTH | {"time_step_rank": "dt_rank"}
_OPTIONS = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA | {"mixer_rms_eps": "bcdt_rms_eps"},
    "mamba2": _BOTH | {"head_dim": "headdim", "n_groups": "ngroups", "time_step_limit": "dt_limit"},
}
# What they may say and we have one value for.
_MODEL = {"hidden_act": "silu"}

# Parameters with another name there than here.
NAMES: dict[str, str] = {}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this layout."""
    return config.get("model_type") in _OPTIONS


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our config, from theirs."""
    kind = config["model_type"]
    # Their class knows the defaults of what a file leaves out.
    theirs = CONFIG_MAPPING[kind].from_dict(dict(config))
    require("load_pretrained", theirs.to_dict(), _MODEL)
    mixer = "mamba2" if kind == "mamba2" else "mamba"
    options = {ours: getattr(theirs, name) for name, ours in _OPTIONS[kind].items()}
    inner = theirs.num_heads * theirs.head_dim if kind == "mamba2" else theirs.intermediate_size
    # A published config says one factor, and a width that is another times hidden_size; the width holds.
    options["expand"], rest = divmod(inner, theirs.hidden_size)
    if rest:
        rule = f"the width of the scan must be a multiple of hidden_size = {theirs.hidden_size}"
        raise NotImplementedError(error("load_pretrained", rule, inner))
    fields = {ours: getattr(theirs, name) for name, ours in _FIELDS.items()}
    return fields | {"mixers": [mixer] * theirs.num_hidden_layers, "mixer_options": {mixer: options}}


def write_config(config: SSMConfig) -> dict[str, Any]:
    """Their config, from ours; what theirs has no word for is refused."""
    kinds = set(config.mixers)
    if kinds not in ({"mamba"}, {"mamba2"}):
        rule = "mixers must be all mamba or all mamba2"
        raise NotImplementedError(error("export_pretrained", rule, ", ".join(sorted(kinds))))
    mixer = kinds.pop()
    arguments = mixer_arguments(mixer, config)
    require("export_pretrained", {"intermediate_size": config.intermediate_size}, {"intermediate_size": 0})
    require("export_pretrained", arguments, {"causal": True})
    inner = arguments["expand"] * config.hidden_size
    if mixer == "mamba2":
        kind = "mamba2"
        require("export_pretrained", arguments, {"norm_eps": config.norm_eps})
        if arguments["norm_groups"] not in (None, arguments["ngroups"]):
            rule = f"norm_groups must be ngroups = {arguments['ngroups']}"
            raise NotImplementedError(error("export_pretrained", rule, arguments["norm_groups"]))
    else:
        kind = "mamba" if arguments["bcdt_rms_eps"] is None else "falcon_mamba"
    theirs = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    theirs |= {name: arguments[ours] for name, ours in _OPTIONS[kind].items()}
    theirs["num_hidden_layers"] = config.num_hidden_layers
    if mixer == "mamba2":
        theirs["num_heads"] = inner // arguments["headdim"]
    described = CONFIG_MAPPING[kind](**theirs, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]])
    # Through their JSON, which has a form of its own for infinity.
    return json.loads(described.to_json_string())
