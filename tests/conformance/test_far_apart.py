"""Tensors whose rows and tokens lie more than 2^31 elements apart, in memory that is not there until it is touched."""

import numpy as np
import pytest
import torch

from ssmscan.testing import Call, assert_close, draw_cotangents

# Elements from a batch row to the next, and from a token: the third row and the ninth token are past 2^31. Both fit
# into 32 bits, so that it is the product which does not.
BATCH, TIME = 2**30 + 2**16, 2**28
# More tokens than the largest tile of a walk.
ROWS, TOKENS = 3, 33
# An offset that was cut off to 32 bits lands up to 2^31 elements before the tensor, where zeros are read: a wrong
# result in place of the end of the process.
BEFORE = 2**31


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Float32 zeros: a file with holes, of which only what is written takes room."""
    count = BEFORE + (ROWS - 1) * BATCH + TOKENS * TIME
    path = tmp_path_factory.mktemp("far") / "memory"
    yield torch.from_numpy(np.memmap(path, np.float32, "w+", shape=count))
    path.unlink()


def _spread(call: Call, cotangent: torch.Tensor, memory: torch.Tensor) -> tuple[Call, torch.Tensor]:
    """The arguments (b, l, ...) and the gradient of y far apart, side by side with one another."""
    used = 0

    def spread(tensor):
        nonlocal used
        inner = tensor[0, 0].numel()
        view = memory.as_strided(tensor.shape, (BATCH, TIME, *tensor[0, 0].stride()), BEFORE + used)
        used += inner
        assert used <= 2**16
        return view.copy_(tensor)

    return call.each(spread), spread(cotangent)


@pytest.mark.grid(first=True, backends=("cpu", "triton"), interpret="first")
def test_more_than_int32_elements(case, option, backend, size, memory):
    # Where the batch has no axis of its own, one stride serves for both.
    rows = 1 if case.leading else ROWS
    call = case.call(option, {**size, "b": rows, "l": min(size["l"], TOKENS)}).cast(torch.float32)
    dense = call.each(torch.Tensor.contiguous)
    cotangents = draw_cotangents(dense.run("reference"))
    expected = dense.differentiate("reference", cotangents)
    far, dy = _spread(dense, cotangents["y"], memory)
    assert_close(far.differentiate(backend, cotangents | {"y": dy}), expected, torch.float32)
