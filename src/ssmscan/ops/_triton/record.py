"""Calls like one before them: what they launch is written down once, and launched from there.

What a forward or backward allocates and launches follows from the shapes, strides, dtypes and alignment of its tensors
and from its options. To find it out again at each call costs the host some ten times what the launches cost. So the
second call with the same of these is recorded: its allocations, and its launches with the place of each pointer in an
argument or an allocation. From the third on, allocations and launches are made from the record.

A call that does anything else on the device (copies a tensor with the wrong strides, converts one, packs sequences)
is not recorded, nor one that allocates much: there the device has enough to do. Both run as they are, and so does one
with a hook, a keyword argument that it calls between its launches.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of calls met, per function; then all are forgotten.
MOST = 1024
# Bytes that a recorded call may allocate beside what it returns.
LARGEST = 1 << 29
# As PyTorch aligns its allocations.
ALIGNMENT = 512
_VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "view", "_unsafe_view", "slice", "select", "unbind", "split", "split_with_sizes", "narrow", "transpose", "t",
        "permute", "expand", "unsqueeze", "squeeze", "as_strided", "alias", "detach", "_reshape_alias",
    )
)  # fmt: skip
_EMPTY = frozenset((torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like))


class Place(NamedTuple):
    """Where a pointer points: so many bytes into an argument, an allocation that is returned, or the rest of them."""

    base: int
    offset: int


class Launch(NamedTuple):
    compiled: Any
    grid: tuple[int, int, int]
    pointers: tuple[Place | None, ...]
    rest: tuple[Any, ...]


class Record(NamedTuple):
    """Bases are the arguments, then what is returned, then one piece of memory for all other allocations."""

    returned: tuple[tuple[torch.Size, torch.dtype], ...]
    scratch: int
    launches: tuple[Launch, ...]
    # Of each result its number among what is returned; None where there is none; a number alone of a result alone.
    results: tuple[int | None, ...] | int


class _Recorder(TorchDispatchMode):
    """Watches one call; ``failed`` once it does what cannot be recorded."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.failed = False
        # By the identity of a tensor, which stays alive here: the number of what it is a view of.
        self.origins: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.bases: list[Tensor] = []
        self.launches: list[tuple[Any, tuple, list[Place | None], tuple]] = []
        for tensor in arguments:
            self._base(tensor)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        packet = function.overloadpacket
        if packet in _EMPTY and results.is_contiguous():
            self._base(results)
        elif packet in _VIEWS and id(arguments[0]) in self.origins:
            for result in (results,) if isinstance(results, Tensor) else results:
                self._view(result, self.origins[id(arguments[0])])
        else:
            self.failed = True
        return results

    def _base(self, tensor: Tensor) -> None:
        self._view(tensor, len(self.bases))
        self.bases.append(tensor)

    def _view(self, tensor: Tensor, origin: int) -> None:
        self.origins[id(tensor)] = origin
        self.alive.append(tensor)

    def launched(self, compiled: Any, grid: tuple, tensors: Sequence[Tensor | None], rest: tuple) -> None:
        pointers: list[Place | None] = []
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
            elif id(tensor) in self.origins:
                origin = self.origins[id(tensor)]
                pointers.append(Place(origin, tensor.data_ptr() - self.bases[origin].data_ptr()))
            else:
                self.failed = True
        self.launches.append((compiled, grid, pointers, rest))


_local = threading.local()


def recorder() -> _Recorder | None:
    """What records the call that runs on this thread, if one does."""
    return getattr(_local, "recorder", None)


class Recorded:
    """A forward or backward of tensors on a GPU, and the records of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # None of a call that was met once, False of one that cannot be recorded.
        self.records: dict[tuple, Record | bool | None] = {}

    def __call__(self, *arguments: Any, **hooks: Any) -> Any:
        if hooks:
            return self.function(*arguments, **hooks)
        tensors: list[Tensor] = []
        pointers: list[int] = []
        key: list[Any] = []
        for argument in arguments:
            for value in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(value, Tensor):
                    pointer = value.data_ptr()
                    tensors.append(value)
                    pointers.append(pointer)
                    key.append((value.shape, value.stride(), value.dtype, pointer % 16))
                else:
                    key.append(value)
        device = tensors[0].device.index
        met = (device, *key)
        record = self.records.get(met, True)
        if isinstance(record, Record) and device == torch._C._cuda_getDevice():
            return _replay(record, tensors[0], pointers, device)
        if record is None:
            return self._record(met, tensors, arguments)
        if record is True:
            if len(self.records) >= MOST:
                self.records.clear()
            self.records[met] = None
        return self.function(*arguments)

    def _record(self, met: tuple, tensors: list[Tensor], arguments: tuple) -> Any:
        watch = _Recorder(tensors)
        _local.recorder = watch
        try:
            with watch:
                results = self.function(*arguments)
        finally:
            _local.recorder = None
        self.records[met] = _record_of(watch, len(tensors), results) or False
        return results


def _record_of(watch: _Recorder, given: int, results: Any) -> Record | None:
    """What ``watch`` has seen of a call with so many tensors ``given``; None if it cannot be repeated from that."""
    flat = (results,) if isinstance(results, Tensor) else tuple(results)
    allocated = watch.bases[given:]
    numbers = {id(tensor): given + i for i, tensor in enumerate(allocated)}
    if watch.failed or any(result is not None and id(result) not in numbers for result in flat):
        return None
    returned = [numbers[id(result)] for result in flat if result is not None]
    places: dict[int, Place] = {i: Place(i, 0) for i in range(given)}
    places.update({number: Place(given + i, 0) for i, number in enumerate(returned)})
    scratch = 0
    for number, tensor in enumerate(allocated, given):
        if number not in places:
            places[number] = Place(given + len(returned), scratch)
            scratch += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    if scratch > LARGEST or len(set(returned)) < len(returned):
        return None

    def place(pointer: Place | None) -> Place | None:
        if pointer is None:
            return None
        base, offset = places[pointer.base]
        return Place(base, offset + pointer.offset)

    launches = tuple(
        Launch(compiled, grid, tuple(place(pointer) for pointer in pointers), rest)
        for compiled, grid, pointers, rest in watch.launches
    )
    order = tuple(None if result is None else returned.index(numbers[id(result)]) for result in flat)
    new = tuple((watch.bases[number].shape, watch.bases[number].dtype) for number in returned)
    return Record(new, scratch, launches, 0 if isinstance(results, Tensor) else order)


def _replay(record: Record, like: Tensor, pointers: list[int], device: int) -> Any:
    returned = [like.new_empty(shape, dtype=dtype) for shape, dtype in record.returned]
    pointers += [tensor.data_ptr() for tensor in returned]
    if record.scratch:
        # Freed on return: what this stream allocates next comes after the launches.
        scratch = like.new_empty(record.scratch, dtype=torch.uint8)
        pointers.append(scratch.data_ptr())
    stream = torch._C._cuda_getCurrentRawStream(device)
    for compiled, grid, places, rest in record.launches:
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *[None if place is None else pointers[place[0]] + place[1] for place in places], *rest,
        )  # fmt: skip
    if isinstance(record.results, int):
        return returned[0]
    return tuple([None if i is None else returned[i] for i in record.results])
