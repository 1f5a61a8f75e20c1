"""The models of the Mamba papers, and a Transformer of each size."""

from typing import Any

from ssmscan.models.configuration import SSMConfig
from ssmscan.shapes import error

# Width and number of layers. Both papers take GPT-3's sizes with twice the layers, for a layer there is a Mamba or a
# pair of attention and MLP.
_MAMBA = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
_MAMBA2 = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
_HEADS = {"130m": 12, "370m": 16, "780m": 16, "1.3b": 32, "2.7b": 32}

# 50277 tokens of the GPT-NeoX tokenizer, padded to a multiple of 8, and of 16.
_MAMBA_VOCABULARY, _MAMBA2_VOCABULARY = 50280, 50288

PRESETS = (
    *(f"mamba-{size}" for size in _MAMBA),
    *(f"mamba2-{size}" for size in _MAMBA2),
    *(f"transformer-{size}" for size in _HEADS),
    "mamba2attn-2.7b",
)


def preset(name: str, attention_every: int | None = None, **fields: Any) -> SSMConfig:
    """The config of a published model, or of a Transformer or a hybrid of its size.

    Args:
        name: one of ``ssmscan.models.PRESETS``: ``mamba-130m`` … ``mamba-2.8b`` and ``mamba2-130m`` … ``mamba2-2.7b``
            of the two papers; ``transformer-130m`` … ``transformer-2.7b``, with rotary attention and gated MLPs, of
            half as many layers; ``mamba2attn-2.7b``, the second paper's hybrid.
        attention_every: make every k-th layer attention, with heads of 64 channels. Default none.
        fields: of :class:`SSMConfig`, in place of the preset's.

    Returns:
        a new config.

    Raises:
        ValueError: an unknown name, or an ``attention_every`` that leaves no layer of the preset's own kind.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), table 12; Dao and Gu,
    "Transformers are SSMs" (2024), section 9.2.

    Example:
        >>> from ssmscan.models import preset
        >>> config = preset("mamba2-130m", attention_every=6, vocab_size=1024)
        >>> config.mixers[4:7]
        ['mamba2', 'attention', 'mamba2']
    """
    if name not in PRESETS:
        raise ValueError(error("preset", f"name must be of {', '.join(PRESETS)}", repr(name)))
    family, size = name.split("-")
    shape = _transformer(size) if family == "transformer" else _state_space(family, size)
    if attention_every is not None:
        shape |= _hybrid(shape, attention_every)
    return SSMConfig(**(shape | fields))


def _state_space(family: str, size: str) -> dict[str, Any]:
    mixer, sizes, vocabulary = (
        ("mamba", _MAMBA, _MAMBA_VOCABULARY) if family == "mamba" else ("mamba2", _MAMBA2, _MAMBA2_VOCABULARY)
    )
    hidden_size, layers = sizes[size]
    shape = {"vocab_size": vocabulary, "hidden_size": hidden_size, "mixers": [mixer] * layers}
    if family == "mamba2attn":
        shape["mixers"] = ["attention" if i in (9, 18, 27, 36, 45, 56) else mixer for i in range(layers)]
        shape["mixer_options"] = {
            "attention": {"num_heads": 30, "head_dim": 128, "d_conv": 4, "rotary_emb_dim": 64},
        }
    return shape


def _transformer(size: str) -> dict[str, Any]:
    hidden_size, layers = _MAMBA2[size]
    return {
        "vocab_size": _MAMBA2_VOCABULARY,
        "hidden_size": hidden_size,
        "mixers": ["attention"] * (layers // 2),
        "mixer_options": {"attention": {"num_heads": _HEADS[size]}},
        # Two thirds of the usual 4, as a gated MLP has three matrices, in whole tiles.
        "intermediate_size": -(-hidden_size * 8 // (3 * 128)) * 128,
    }


def _hybrid(shape: dict[str, Any], every: int) -> dict[str, Any]:
    mixers = shape["mixers"]
    if isinstance(every, bool) or not isinstance(every, int) or not 2 <= every <= len(mixers):
        raise ValueError(error("preset", f"attention_every must be 2 to the {len(mixers)} layers", repr(every)))
    if "attention" in mixers:
        raise ValueError(error("preset", "attention_every must be of a preset without attention", every))
    return {
        "mixers": ["attention" if i % every == every - 1 else mixer for i, mixer in enumerate(mixers)],
        "mixer_options": {"attention": {"num_heads": shape["hidden_size"] // 64}},
    }
