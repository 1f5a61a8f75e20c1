"""The files of a checkpoint, in a folder or on the hub: one config, and weights in one file or in several."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ssmscan.shapes import error

# In the order in which they are looked for; an index says which of several files has a tensor.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find(source: str | Path, name: str) -> Path | None:
    """The file ``name`` of a checkpoint; None where there is none. ``source`` is a folder, or a name on the hub."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    if not _HUB_NAME.fullmatch(str(source)):
        rule = "path_or_name must be a folder, or a model on the hub as owner/name"
        raise ValueError(error("load_pretrained", rule, repr(str(source))))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except EntryNotFoundError:
        return None


def read_json(source: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None where there is none."""
    path = find(source, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)


def _special_float(entry: dict[str, Any]) -> Any:
    """transformers writes an infinite or undefined number as ``{"__float__": "Infinity"}``."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, on the CPU; nothing but tensors is unpickled."""
    for name in _WEIGHTS:
        path = find(source, name)
        if path is None:
            continue
        if path.suffix != ".json":
            return _read_tensors(path)
        weights: dict[str, Tensor] = {}
        for part in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
            part_path = find(source, part)
            if part_path is None:
                raise ValueError(error("load_pretrained", f"every file that {name} names must exist", f"no {part}"))
            weights |= _read_tensors(part_path)
        return weights
    raise ValueError(error("load_pretrained", f"{source} must hold one of {', '.join(_WEIGHTS)}", "none"))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
