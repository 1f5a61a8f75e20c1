"""The mixers that a model can name, and how one is built from a config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ssmscan.layers import RGLRU, S4D, Attention, GatedSSM, Hydra, Mamba, Mamba2, MatrixSSM
from ssmscan.layers.mixer import Mixer
from ssmscan.shapes import error

if TYPE_CHECKING:
    from ssmscan.models.configuration import SSMConfig

MIXERS: dict[str, type[Mixer]] = {
    "gated_ssm": GatedSSM,
    "matrix_ssm": MatrixSSM,
    "s4d": S4D,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "hydra": Hydra,
    "rg_lru": RGLRU,
    "attention": Attention,
}
# What the model decides for all of its layers.
_WHOLE = ("d_model", "device", "dtype")


@cache
def _defaults(name: str) -> Mapping[str, Any]:
    """The arguments that a mixer's options can give, with their defaults; those without one are to be given."""
    parameters = inspect.signature(MIXERS[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items() if option not in _WHOLE}


def check_options(name: str, options: object) -> None:
    """``options`` are arguments that the class of the mixer ``name`` has."""
    if not isinstance(options, Mapping):
        raise TypeError(error("SSMConfig", f"mixer_options of {name} must be a dict", repr(options)))
    for option in options:
        if option not in _defaults(name):
            known = ", ".join(_defaults(name))
            raise ValueError(error("SSMConfig", f"mixer_options of {name} must be of {known}", repr(option)))


def mixer_arguments(name: str, config: SSMConfig) -> dict[str, Any]:
    """All arguments of the mixer ``name`` in a model: its options over the model's fields over the defaults."""
    arguments = dict(_defaults(name))
    for option in arguments.keys() & {"norm_eps", "norm_groups"}:
        arguments[option] = getattr(config, option)
    for option, value in config.mixer_options.get(name, {}).items():
        # A config from JSON has lists only.
        arguments[option] = tuple(value) if isinstance(value, list) else value
    missing = [option for option, value in arguments.items() if value is inspect.Parameter.empty]
    if missing:
        advice = f'Give it as mixer_options={{"{name}": {{"{missing[0]}": …}}}}.'
        raise ValueError(error("SSMConfig", f"mixer_options of {name} must give {', '.join(missing)}", "none", advice))
    return arguments


def build_mixer(name: str, config: SSMConfig) -> Mixer:
    """A mixer of a model."""
    return MIXERS[name](config.hidden_size, **mixer_arguments(name, config))
