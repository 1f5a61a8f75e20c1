"""How the CPU's kernels are compiled, and when what was compiled before still holds."""

import ast
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, Literal

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile


def compiled(
    function: Callable[..., Any] | None = None,
    *,
    fastmath: bool | set[str] = False,
    inline: Literal["never", "always"] = "never",
) -> Any:
    """A decorator: ``function``, a kernel or a part of one, as machine code that needs no Python.

    Args:
        function: what is decorated; None where the decorator itself is called.
        fastmath: which liberties are taken with floating-point arithmetic, as Numba names them.
        inline: "always" puts the code where it is called from before types are inferred.
    """
    if function is None:
        return lambda function: compiled(function, fastmath=fastmath, inline=inline)
    dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=fastmath, inline=inline)(function)
    # It raises where no folder can be written to, as a package that is read-only, used by someone without a home.
    with suppress(RuntimeError):
        dispatcher._cache = SourceCache(function)
    return dispatcher


class SourceCache(FunctionCache):
    """Numba's cache of one function, valid as long as nothing has changed that it was made of.

    Numba itself looks at the file of the function alone, not at those from which it takes constants and functions.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        of_its_file = self._impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(
            self.cache_path, self._impl.filename_base, (of_its_file, stamp(function.__module__))
        )

    # What cannot be read is compiled, and what cannot be written, on a full disk, is compiled again in another process.

    def load_overload(self, signature: Any, target: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(signature, target)

    def save_overload(self, signature: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(signature, data)


@cache
def stamp(module: str) -> str:
    """A hash of the sources of ``module`` and of all that it imports from its package, directly or not."""
    found: dict[str, str] = {}
    _collect(module, found)
    return sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()


def _collect(module: str, found: dict[str, str]) -> None:
    if module in found:
        return
    spec = find_spec(module)
    found[module] = spec.loader.get_source(module) or ""  # type: ignore[union-attr]
    package = module.partition(".")[0]
    for node in ast.walk(ast.parse(found[module])):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == package:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                _collect(name if name in sys.modules else str(node.module), found)
