"""SSMConfig: the shape of a model, as transformers keeps it in config.json."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from ssmscan.models.mixers import MIXERS, check_options, mixer_arguments
from ssmscan.shapes import error

# What transformers passes to every config beside its own fields.
_PASSED = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_weights",
}


class SSMConfig(PretrainedConfig):
    """The shape of an :class:`ssmscan.models.SSMForCausalLM`: a residual stream with one mixer a layer.

    The defaults are those of ``preset("mamba2-130m")``. All arguments are keywords; those of every transformers config
    (``bos_token_id``, ``dtype``, …) are taken too, and any other is refused.

    Args:
        vocab_size: number v of tokens, rows of the embedding. Default 50288.
        hidden_size: width m of the residual stream. Default 768.
        mixers: the mixer of each layer, first to last: "gated_ssm", "matrix_ssm", "s4d", "mamba", "mamba2", "hydra",
            "rg_lru" or "attention". Default 24 times "mamba2".
        mixer_options: arguments of a mixer's class in :mod:`ssmscan.layers`, by the mixer's name, for all layers that
            have it: ``{"mamba2": {"d_state": 64}}``. Default none: the classes' defaults.
        intermediate_size: width of the gated MLP that follows each mixer; 0 is no MLP. Default 0.
        norm_eps: added to the mean square in every norm. Default 1e-5.
        norm_groups: groups of channels that the gated norm inside mamba2 and hydra normalises each on its own; None is
            one for each group of B and C, as the state-spaces code has it. Default None.
        residual_in_fp32: keep the residual stream in float32 when the weights are narrower. Default True.
        tie_word_embeddings: the head's weight is the embedding's. Default True.
        initializer_range: standard deviation of the embedding at the start. Default 0.02.
        use_cache: return the layers' states from a forward that is not training. Default True.
        bos_token_id, eos_token_id, pad_token_id: for generate. Default None.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, an unknown mixer, option or keyword.

    Example:
        >>> from ssmscan.models import SSMConfig
        >>> config = SSMConfig(vocab_size=256, hidden_size=64, mixers=["mamba", "mamba", "mamba2"])
        >>> config.num_hidden_layers
        3
    """

    model_type = "ssmscan"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    vocab_size: int = 50288
    hidden_size: int = 768
    mixers: Sequence[str] = ("mamba2",) * 24
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    intermediate_size: int = 0
    norm_eps: float = 1e-5
    norm_groups: int | None = None
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = kwargs.keys() - _PASSED
        if unknown:
            known = ", ".join(field.name for field in fields(SSMConfig) if field.name in SSMConfig.__annotations__)
            raise ValueError(
                error("SSMConfig", "every keyword must be a field", ", ".join(sorted(unknown)), f"The fields: {known}.")
            )
        self._check()
        # As they come back from JSON, so that a config equals the one that was saved and loaded.
        self.mixers = list(self.mixers)
        self.mixer_options = _plain(self.mixer_options)
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, least in (("vocab_size", 1), ("hidden_size", 1), ("intermediate_size", 0)):
            _require_integer(name, getattr(self, name), least)
        if self.norm_groups is not None:
            _require_integer("norm_groups", self.norm_groups, 1)
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(error("SSMConfig", f"{name} must be a number", repr(value)))
            if not 0 < value < math.inf:
                raise ValueError(error("SSMConfig", f"{name} must be positive and finite", value))
        for name in ("residual_in_fp32", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(error("SSMConfig", f"{name} must be true or false", repr(getattr(self, name))))
        self._check_mixers()

    def _check_mixers(self) -> None:
        known = ", ".join(MIXERS)
        if isinstance(self.mixers, str) or not isinstance(self.mixers, Iterable):
            advice = f'One name for each layer, such as ["{self.mixers}"] * 4.' if self.mixers in MIXERS else ""
            raise TypeError(error("SSMConfig", "mixers must be a list of names", repr(self.mixers), advice))
        if len(self.mixers) == 0:
            raise ValueError(error("SSMConfig", "mixers must name at least one layer's mixer", "none"))
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(error("SSMConfig", f"mixers must be of {known}", repr(name)))
        if not isinstance(self.mixer_options, dict):
            raise TypeError(
                error("SSMConfig", "mixer_options must be a dict from mixers to their arguments", self.mixer_options)
            )
        for name, options in self.mixer_options.items():
            if name not in self.mixers:
                raise ValueError(error("SSMConfig", "mixer_options must be for mixers that the model has", repr(name)))
            check_options(name, options)
        for name in set(self.mixers):
            mixer_arguments(name, self)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, one for each of ``mixers``."""
        return len(self.mixers)

    @property
    def layer_types(self) -> list[str]:
        """transformers' name of each layer's kind: only attention is not linear in the length."""
        return ["full_attention" if name == "attention" else "linear_attention" for name in self.mixers]


def _require_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(error("SSMConfig", f"{name} must be an integer", repr(value)))
    if value < least:
        raise ValueError(error("SSMConfig", f"{name} must be at least {least}", value))


def _plain(value: Any) -> Any:
    """``value`` with lists for tuples, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
