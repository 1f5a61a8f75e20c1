"""transformers' own state-space models on our operations, until they are put back."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ssmscan.models.patch import replacements as our
from ssmscan.models.patch import steps
from ssmscan.shapes import error

# The releases whose model files were tried, the first and the last.
OLDEST, NEWEST = (5, 17), (5, 24)


class Around(NamedTuple):
    """What makes, of the function that stands in a place, the one that takes it and calls the first."""

    make: Callable[[Callable[..., Any]], Callable[..., Any]]


Replacement = Callable[..., Any] | Around

_CONVOLUTION: dict[str, Replacement] = {"causal_conv1d_fn": our.conv, "causal_conv1d_update": our.conv_update}
_MAMBA: dict[str, Replacement] = _CONVOLUTION | {
    "mamba_selective_scan": our.mamba_scan,
    "mamba_selective_state_update": our.mamba_update,
    "mamba_inner_fn": our.unfused,
}
_MAMBA2: dict[str, Replacement] = _CONVOLUTION | {
    "mamba2_chunk_scan": our.mamba2_scan,
    "mamba2_selective_state_update": our.mamba2_update,
    "mamba2_split_conv1d_scan_combined": our.unfused,
}


def _norms(*classes: str) -> dict[str, Replacement]:
    return {f"{name}.forward": our.norm for name in classes}


_UNPACKED = Around(our.unpacked)
_MAMBA_STEP, _MAMBA2_STEP = Around(steps.mamba), Around(steps.mamba2)

# Of each architecture, what is replaced in its model file: a function of the file, or a method of one of its classes.
# A class that a release lacks is left out: Nemotron-H first had Zamba2's gated norm, and then its own.
REPLACEMENTS: Mapping[str, Mapping[str, Replacement]] = {
    "mamba": _MAMBA
    | _norms("MambaRMSNorm")
    | {"MambaModel.forward": _UNPACKED, "MambaForCausalLM.forward": _UNPACKED, "MambaMixer.forward": _MAMBA_STEP},
    "falcon_mamba": _MAMBA
    | _norms("FalconMambaRMSNorm")
    | {
        "FalconMambaModel.forward": _UNPACKED,
        "FalconMambaForCausalLM.forward": _UNPACKED,
        "FalconMambaMixer.forward": _MAMBA_STEP,
    },
    "jamba": _MAMBA
    | _norms("JambaRMSNorm")
    | {"JambaModel.forward": _UNPACKED, "JambaMambaMixer.forward": _MAMBA_STEP},
    "mamba2": _MAMBA2
    | _norms("Mamba2RMSNorm", "MambaRMSNormGated")
    | {"Mamba2ForCausalLM.forward": Around(our.packed), "Mamba2Mixer.forward": _MAMBA2_STEP},
    "bamba": _MAMBA2 | _norms("BambaRMSNorm", "BambaRMSNormGated") | {"BambaMixer.forward": _MAMBA2_STEP},
    "falcon_h1": _MAMBA2 | _norms("FalconH1RMSNorm", "FalconH1RMSNormGated"),
    "nemotron_h": _MAMBA2
    | _norms("NemotronHRMSNorm", "NemotronHRMSNormGated", "Zamba2RMSNormGated")
    | {"NemotronHMamba2Mixer.forward": _MAMBA2_STEP},
    "zamba2": _MAMBA2 | _norms("Zamba2RMSNorm", "Zamba2RMSNormGated") | {"Zamba2MambaMixer.forward": _MAMBA2_STEP},
    "granitemoehybrid": _MAMBA2
    | _norms("GraniteMoeHybridRMSNorm", "GraniteMoeHybridRMSNormGated")
    | {"GraniteMoeHybridMambaLayer.forward": _MAMBA2_STEP},
    "recurrent_gemma": {"RecurrentGemmaRglru._rnn_scan": our.rg_lru_scan, "RecurrentGemmaModel.forward": _UNPACKED},
}

# What was replaced: the module or class, the name in it, and what stood there.
_replaced: dict[str, list[tuple[Any, str, Any]]] = {}


def patch_transformers(*architectures: str) -> None:
    """Make transformers' own state-space models run on this library's operations, on the CPU and on CUDA.

    Functions and methods of transformers' model files are replaced, for the whole process, until
    :func:`unpatch_transformers`. Models made before and after it, their parameters, configurations and caches stay
    transformers'; what changes is how the convolutions, scans, decode steps and norms are computed. The projections
    into and out of a layer are called as modules, so that LoRA takes part, also where mamba_ssm is installed. Sequences
    packed by ``seq_idx`` are kept apart by the Mamba-2 models; those of Mamba-1 and RecurrentGemma refuse them.

    Args:
        architectures: names of transformers' models: any of mamba, falcon_mamba, jamba, mamba2, bamba, falcon_h1,
            nemotron_h, zamba2, granitemoehybrid and recurrent_gemma. None named are all that this transformers has.

    Raises:
        ValueError: the name of no such model.
        NotImplementedError: a transformers whose model files were not tried.

    Example:
        >>> import ssmscan
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> ssmscan.patch_transformers()
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2))
        >>> ssmscan.unpatch_transformers()
    """
    _check_version()
    for architecture in architectures:
        if architecture not in REPLACEMENTS:
            rule = f"an architecture must be one of {', '.join(REPLACEMENTS)}"
            raise ValueError(error("patch_transformers", rule, repr(architecture)))
    for architecture in architectures or REPLACEMENTS:
        if architecture not in _replaced and importlib.util.find_spec(f"transformers.models.{architecture}"):
            _replaced[architecture] = _patch(architecture)


def unpatch_transformers() -> None:
    """Put back what :func:`patch_transformers` replaced; without it, do nothing."""
    while _replaced:
        _architecture, originals = _replaced.popitem()
        for owner, name, original in originals:
            setattr(owner, name, original)


def _patch(architecture: str) -> list[tuple[Any, str, Any]]:
    """Replace what the table says of one architecture; return where, and what stood there."""
    file = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    originals = []
    for path, replacement in REPLACEMENTS[architecture].items():
        *names, name = path.split(".")
        owner: Any = getattr(file, names[0], None) if names else file
        if owner is None:
            continue
        original = vars(owner)[name]
        originals.append((owner, name, original))
        setattr(owner, name, replacement.make(original) if isinstance(replacement, Around) else replacement)
    return originals


def _check_version() -> None:
    """Refuse a transformers whose model files may differ from what the table says."""
    import transformers

    release = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if not OLDEST <= release <= NEWEST:
        tried = " to ".join(".".join(map(str, limit)) for limit in (OLDEST, NEWEST))
        rule = f"transformers must be of a release whose models were tried, {tried}"
        raise NotImplementedError(error("patch_transformers", rule, transformers.__version__, "Install one of those."))
