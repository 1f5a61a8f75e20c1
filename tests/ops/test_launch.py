"""How launches are remembered: what a compiled kernel is kept under, and calls that are launched from a record."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from ssmscan.ops._triton import record
from ssmscan.ops._triton.launch import kinds, specialised


def _kinds(*tensors):
    return kinds(tensors, [None if t is None else t.data_ptr() for t in tensors])


def test_pointers_are_told_apart_by_alignment_and_dtype():
    """A kernel compiled for vectors of 16 bytes must not be given a pointer in between."""
    x = torch.zeros(64)
    assert _kinds(x[4:]) == _kinds(x[8:])
    assert len({_kinds(x[i:]) for i in range(4)}) == 4
    assert _kinds(x) != _kinds(x.view(torch.int32))
    assert _kinds(x, None) != _kinds(None, x)


def test_integers_are_told_apart_as_triton_does():
    assert specialised((1, 2, 48)) == specialised((1, 3, 16))
    assert len({specialised((v,)) for v in (1, 2, 16, 1 << 31, (1 << 31) + 1, -(1 << 31) - 16)}) == 5
    assert specialised((-(1 << 31),)) == specialised((16,))


class _Inputs(NamedTuple):
    x: torch.Tensor
    bias: torch.Tensor | None


class _Kernel:
    """Like a compiled one: y = 2·x + 1 by a scratch, written down as (function, pointers, rest)."""

    function = "function"
    packed_metadata = "metadata"

    def __init__(self):
        self.launches = []

    def run(self, x, y, z, stream, function, metadata, *rest):
        self.launches.append(((x, y, z), rest[3:]))


KERNEL = _Kernel()


def _forward(inputs, scale):
    x = inputs.x
    y = x.new_empty(x.shape)
    parts = x.new_empty(2, *x.shape, dtype=torch.float32)
    first, second = parts.unbind(0)
    final = x.new_empty(3)
    watch = record.recorder()
    for tensors in ((x[1:], first, None), (second, y.view(-1), final)):
        KERNEL.run(1, 2, 3, 0, None, None, None, None, None, *(None if t is None else t.data_ptr() for t in tensors))
        if watch is not None:
            watch.launched(KERNEL, (1, 2, 3), tensors, (scale, "constant"))
    return [y, None, final]


@pytest.fixture
def recorded(monkeypatch):
    """On the CPU, where there is neither a device nor a stream."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    KERNEL.launches.clear()
    return record.Recorded(_forward)


def test_the_third_call_is_launched_from_the_record(recorded):
    for _ in range(2):
        recorded(_Inputs(torch.zeros(4, 8), None), 2.0)
    KERNEL.launches.clear()
    x = torch.zeros(4, 8)
    y, nothing, final = recorded(_Inputs(x, None), 2.0)
    assert nothing is None
    assert (y.shape, y.dtype, final.shape) == (x.shape, x.dtype, (3,))
    (grid, (source, first, none, *rest)), (_, (second, target, last, *_)) = KERNEL.launches
    assert grid == (1, 2, 3)
    assert rest == [2.0, "constant"]
    assert none is None
    # The second row of x; y from its begin; the halves of the scratch, as far apart as they were.
    assert source == x.data_ptr() + 32
    assert (target, last) == (y.data_ptr(), final.data_ptr())
    assert second - first == 4 * 8 * 4


@pytest.mark.parametrize(
    "other",
    [
        (_Inputs(torch.zeros(4, 9), None), 2.0),
        (_Inputs(torch.zeros(8, 4).t(), None), 2.0),
        (_Inputs(torch.zeros(33)[1:].view(4, 8), None), 2.0),
        (_Inputs(torch.zeros(4, 8, dtype=torch.float16), None), 2.0),
        (_Inputs(torch.zeros(4, 8), torch.zeros(4, 8)), 2.0),
        (_Inputs(torch.zeros(4, 8), None), 3.0),
    ],
    ids=["shape", "strides", "alignment", "dtype", "another tensor", "option"],
)
def test_another_call_is_not_launched_from_it(recorded, other):
    for _ in range(3):
        recorded(_Inputs(torch.zeros(4, 8), None), 2.0)
    records = len(recorded.records)
    recorded(*other)
    assert len(recorded.records) == records + 1


@pytest.mark.parametrize("work", [lambda x: x.float().double(), lambda x: x + 1, lambda x: x.t().contiguous()])
def test_work_beside_the_launches_is_not_recorded(recorded, work):
    def function(inputs, scale):
        work(inputs.x)
        return _forward(inputs, scale)

    recorded.function = function
    for _ in range(3):
        recorded(_Inputs(torch.zeros(4, 8), None), 2.0)
    assert list(recorded.records.values()) == [False]


def test_calls_met_once_are_forgotten(recorded, monkeypatch):
    monkeypatch.setattr(record, "MOST", 3)
    for n in range(1, 9):
        recorded(_Inputs(torch.zeros(4, n), None), 2.0)
    assert len(recorded.records) <= 3
