"""What a layout cannot hold, or we cannot compute, is refused by name."""

from collections.abc import Mapping
from typing import Any

from ssmscan.shapes import error


def require(function: str, given: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Where ``given`` has a key of ``supported``, it has the same value."""
    for key, value in supported.items():
        if key in given and given[key] != value:
            raise NotImplementedError(error(function, f"{key} must be {value!r}", repr(given[key])))
