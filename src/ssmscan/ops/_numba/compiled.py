"""How the CPU's kernels are compiled, and when what was compiled before still holds."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from inspect import getsourcefile
from pathlib import Path
from types import CodeType
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

    Numba itself looks at the file of the function alone, not at the functions and constants of others.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        found: dict[str, str] = {}
        _collect(function, found)
        stamp = self._impl.locator.get_source_stamp(), sorted(found.items())
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, stamp)

    # What cannot be read is compiled, and what cannot be written, on a full disk, is compiled again in another process.

    def load_overload(self, signature: Any, target: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(signature, target)

    def save_overload(self, signature: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(signature, data)


def _collect(function: Any, found: dict[str, str]) -> None:
    """What ``function`` is made of, by name: the files of the functions that it calls, and values of constants."""
    # Of a compiled function or an intrinsic, the one that was decorated.
    function = getattr(function, "py_func", getattr(function, "_defn", function))
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found or not hasattr(function, "__code__"):
        return
    found[name] = _hash(getsourcefile(function))
    package = function.__module__.partition(".")[0]
    for constant in _names(function.__code__):
        value = function.__globals__.get(constant)
        if isinstance(value, int | float | str | tuple):
            found[f"{function.__module__}.{constant}"] = repr(value)
        elif callable(value) and str(getattr(value, "__module__", "")).partition(".")[0] == package:
            _collect(value, found)


def _names(code: CodeType) -> Iterator[str]:
    """The names of others that code, and functions in it, use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@cache
def _hash(path: str | None) -> str:
    return sha256(Path(path).read_bytes()).hexdigest() if path is not None and Path(path).exists() else ""
