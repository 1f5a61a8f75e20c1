"""What holds for all tests: without a GPU, Triton's kernels run on the CPU by interpretation."""

import inspect
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch


def _quicken_interpreter() -> None:
    """The interpreter lists the whole language at each call of a helper in a kernel, to patch what is patched already.

    That takes half of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def getmembers(package):
        if all(tl.core.is_builtin(getattr(package, name)) for name in names(package)[:1]):
            return [(name, getattr(package, name)) for name in names(package)]
        return []

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


def _round_in_interpreter() -> None:
    """The interpreter cuts float32 off to bfloat16, which doubles the error; a GPU rounds to the nearest number."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        # Half a unit, less where that would leave an odd number.
        near = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, near.reshape(data.shape)).astype(np.uint16)

    interpreter._convert_float = rounded


if torch.cuda.is_available():
    # Deterministic matrix products, by which unwritten memory is found, need this before the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
elif find_spec("triton") is not None:
    # Triton reads it when it decorates a kernel, so it is set before the package is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    _quicken_interpreter()
    _round_in_interpreter()

# A shell's background processes ignore SIGINT, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same few examples in every run; `--hypothesis-profile=explore` looks for new ones, and shrinks what fails.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, max_examples=4, phases=[hypothesis.Phase.generate]
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=200)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def tokens_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Texts that tests train on leave their tokens in a folder of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMSCAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def compiler() -> Iterator[Callable[..., Any]]:
    """Calls functions in a process in which Triton compiles, and does not interpret."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        executor.submit(int).result()
    with executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # The settings name a timeout, which pytest refuses to read where the plugin is not installed.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds after which a test fails; without effect here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
