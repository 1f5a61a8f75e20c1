"""Set before the package is imported: without a GPU, Triton's kernels run on the CPU by interpretation."""

import os
from importlib.util import find_spec

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=4)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=200)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    # The settings name a timeout, which pytest refuses to read where the plugin is not installed.
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds after which a test fails; without effect here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
