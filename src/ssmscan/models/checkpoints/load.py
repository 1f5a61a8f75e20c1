"""load_pretrained and export_pretrained: models from other checkpoints, and into them, with nothing left over."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import GenerationConfig

from ssmscan.models.checkpoints import state_spaces_layout, transformers_layout
from ssmscan.models.checkpoints.files import read_json, read_weights
from ssmscan.models.configuration import SSMConfig
from ssmscan.models.modeling import SSMForCausalLM
from ssmscan.shapes import error

_LAYOUTS: dict[str, ModuleType] = {"transformers": transformers_layout, "state-spaces": state_spaces_layout}
_HEAD, _EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"


def load_pretrained(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **fields: Any,
) -> SSMForCausalLM:
    """A model from a checkpoint: ours, transformers', or that of the Mamba papers' code.

    The layout is told from config.json: our own ``save_pretrained``; transformers' ``mamba``, ``mamba2`` and
    ``falcon_mamba``; state-spaces' Mamba-1 and Mamba-2, with attention or not. Weights are in safetensors or in
    PyTorch's format, of which nothing but tensors is read, in one file or in several.

    Args:
        path_or_name: a folder, or the name of a model on the hub, ``owner/name``.
        dtype: of the parameters, but for those that stay float32; None is that of the file.
        device: where the model goes. Default the CPU.
        fields: of :class:`SSMConfig`, in place of what the checkpoint says.

    Returns:
        an :class:`SSMForCausalLM`, for inference (``eval()``).

    Raises:
        ValueError: no such folder, an unknown layout, or tensors that are missing, of another shape, or left over;
            they are named.
        NotImplementedError: a model that ours cannot be.

    Example:
        >>> import tempfile
        >>> from ssmscan.models import SSMConfig, SSMForCausalLM, load_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SSMForCausalLM(SSMConfig(vocab_size=16, hidden_size=8, mixers=["mamba"])).save_pretrained(folder)
        ...     load_pretrained(folder).config.mixers
        ['mamba']
    """
    description = read_json(path_or_name, "config.json")
    if description is None:
        raise ValueError(error("load_pretrained", f"{path_or_name} must hold config.json", "none"))
    if description.get("model_type") == SSMConfig.model_type:
        config, names = SSMConfig.from_dict(description | fields), {}
    else:
        layout = next((layout for layout in _LAYOUTS.values() if layout.matches(description)), None)
        if layout is None:
            rule = "config.json must be of ssmscan, mamba, mamba2, falcon_mamba or state-spaces"
            raise ValueError(error("load_pretrained", rule, f"model_type {description.get('model_type')!r}"))
        config, names = SSMConfig(**(layout.read_config(description) | fields)), layout.NAMES
    weights = {names.get(name, name): tensor for name, tensor in read_weights(path_or_name).items()}
    with torch.device("meta"):
        model = SSMForCausalLM(config)
    if config.tie_word_embeddings:
        _tie(weights)
    _check(weights, model.state_dict())
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    generation = read_json(path_or_name, "generation_config.json")
    if generation is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
        # The special tokens are fields of both configs.
        model.generation_config.update(**fields)
    return model.to(device=device, dtype=dtype).eval()


def _tie(weights: dict[str, Tensor]) -> None:
    """One tensor for embedding and head, of which a file may have either, or both where they are equal."""
    if _HEAD in weights and _EMBEDDING in weights and not torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        rule = f"{_HEAD} must be equal to {_EMBEDDING} in a model with tied embeddings"
        advice = "Pass tie_word_embeddings=False if the head is one of its own."
        raise ValueError(error("load_pretrained", rule, "another tensor", advice))
    for name, other in ((_HEAD, _EMBEDDING), (_EMBEDDING, _HEAD)):
        if name not in weights and other in weights:
            weights[name] = weights[other]


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "left over": extra, "of another shape": misshapen}
    if missing or extra or misshapen:
        got = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(error("load_pretrained", "the tensors must be those of the config", got))


def export_pretrained(
    model: SSMForCausalLM, path: str | Path, layout: Literal["transformers", "state-spaces"] = "transformers"
) -> None:
    """Write a model as others read it: see :meth:`SSMForCausalLM.export_pretrained`."""
    if layout not in _LAYOUTS:
        raise ValueError(error("export_pretrained", f"layout must be of {', '.join(_LAYOUTS)}", repr(layout)))
    description = _LAYOUTS[layout].write_config(model.config)
    names = {ours: theirs for theirs, ours in _LAYOUTS[layout].NAMES.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {names.get(name, name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if layout == "state-spaces":
        # Their code reads this file, and looks for the head even where it is the embedding.
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        if model.config.tie_word_embeddings:
            del weights[_HEAD]
        description["dtype"] = str(model.dtype).removeprefix("torch.")
        _save_sharded(weights, folder)
        model.generation_config.save_pretrained(folder)
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _save_sharded(weights: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(weights, folder)
