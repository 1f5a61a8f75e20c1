"""The decode steps, and what their tests share: ways to call them, and the tensors of a call.

Without a GPU the step functions take their kernels where they are made to believe in one, and Triton interprets.
"""

import pytest
import torch

from ssmscan.backend import choose
from ssmscan.ops import decoding
from ssmscan.ops.causal_conv1d.case import CASE as CAUSAL_CONV1D
from ssmscan.ops.linear_scan.case import CASE as LINEAR_SCAN
from ssmscan.ops.matrix_scan.case import CASE as MATRIX_SCAN
from ssmscan.ops.rg_lru.case import CASE as RG_LRU
from ssmscan.ops.s4d.case import CASE as S4D
from ssmscan.ops.selective_scan.case import CASE as SELECTIVE_SCAN
from ssmscan.ops.selective_scan.case import LOGARITHM as SELECTIVE_SCAN_LOGARITHM
from ssmscan.ops.ssd.case import CASE as SSD
from ssmscan.ops.ssd.case import ELEMENTWISE
from ssmscan.ops.ssd.case import LOGARITHM as SSD_LOGARITHM

CASES = (CAUSAL_CONV1D, LINEAR_SCAN, MATRIX_SCAN, RG_LRU, SELECTIVE_SCAN, SSD, S4D)
OPTIONS = [
    (case, option)
    for case in CASES
    for option in case.options
    if case.has(option, "step") and option.name != "conv, complex"
]
OPTIONS += [(SSD, ELEMENTWISE), (SSD, SSD_LOGARITHM), (SELECTIVE_SCAN, SELECTIVE_SCAN_LOGARITHM)]
FIRST = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ALL = pytest.mark.parametrize(("case", "option"), OPTIONS, ids=lambda value: value.name.replace(" ", "_"))


def pretend(setattr):
    """There is a GPU, as far as the steps know."""
    setattr(decoding, "choose", lambda function, backend, _, dtype: choose(function, backend, "cuda", dtype))


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def one_token(case, option, size, dtype, device, extreme=None):
    """The tensors of one token and a state, as a user would pass them at ``dtype``."""
    given, h = some_tokens(case, option, {**size, "l": 1}, dtype, device, extreme)
    return each(case, given, lambda tensor: tensor[:, 0]), h


def some_tokens(case, option, size, dtype, device, extreme=None):
    """The tensors of several tokens and a state."""
    size = {**case.sizes[0], **size}
    tensors = case.draw(size, option, extreme=extreme)
    state = case.draw_state(size, size["b"], dtype=torch.complex128)
    # Complex poles make a complex state.
    is_complex = any(tensor.is_complex() for tensor in tensors.values())
    h = (state if is_complex else state.real).to(device, torch.complex64 if is_complex else torch.float32)
    return case.cast(tensors, dtype, device), h


def each(case, given, function):
    """With ``function`` applied to what each token has of its own."""
    return {name: function(tensor) if name in case.sequence else tensor for name, tensor in given.items()}


def narrow(h, dtype):
    """There are no narrow complex states."""
    return h if h.is_complex() else h.to(dtype)
