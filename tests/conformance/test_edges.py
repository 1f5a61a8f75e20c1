"""Empty and single-token inputs, untouched arguments, strides, and outputs that are nobody else's memory."""

import pytest
import torch

from ssmscan.testing import Setting, assert_close, assert_same_bits, draw_cotangents, widest

REFERENCE = ("reference", "torch", "cpu", "triton")


@pytest.mark.grid(first=True, backends=REFERENCE, interpret="first")
def test_empty(case, option, backend, device, setting, size):
    """Nothing to run: the state passes through, and every gradient has its argument's shape."""
    for axis in {"d"} & {*size} if setting.lengths is not None else {"b", "l", "d"} & {*size}:
        call = case.call(option, {**size, axis: 0}, setting).cast(torch.float32, device)
        values = call.differentiate(backend)
        assert values["y"].shape == call.tensors["x"].shape
        assert {n: values[f"d{n}"].shape for n in call.tensors} == {n: t.shape for n, t in call.tensors.items()}
        assert all(values[f"d{name}"].count_nonzero() == 0 for name in call.tensors if name != "h0")
        if "h" in values:
            assert torch.equal(values["h"], call.tensors.get("h0", torch.zeros_like(values["h"])))
        if "h0" in call.tensors:
            assert torch.equal(values["dh0"], draw_cotangents(values)["h"])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
@pytest.mark.grid(first=True, needs=("cu_seqlens",), backends=REFERENCE)
def test_packed_without_tokens(case, option, backend, device, size, lengths):
    setting = Setting("no tokens", h0=case.has(option, "h0"), lengths=lengths)
    call = case.call(option, size, setting).cast(torch.float32, device)
    values = call.differentiate(backend)
    assert values["y"].shape == call.tensors["x"].shape
    if "h0" in call.tensors:
        assert torch.equal(values["h"], call.tensors["h0"])
        assert torch.equal(values["dh0"], draw_cotangents(values)["h"])


@pytest.mark.grid(backends=REFERENCE, interpret="first")
def test_one_token(case, option, backend, device, size):
    """The last tokens, given the state before them, through the same code that runs whole sequences."""
    call = case.call(option, {**size, "l": 1}).cast(widest(backend), device)
    assert_close(call.differentiate(backend), call.differentiate("reference"), widest(backend))


@pytest.mark.grid(first=True, backends=REFERENCE)
def test_arguments_are_not_modified(case, option, backend, device, dtype, setting, size):
    call = case.call(option, size, setting).cast(dtype, device)
    given = {**call.tensors, **{n: v for n, v in call.keywords.items() if isinstance(v, torch.Tensor)}}
    before = {name: tensor.clone() for name, tensor in given.items()}
    cotangents = draw_cotangents(call.run(backend))
    incoming = {name: cotangent.clone() for name, cotangent in cotangents.items()}
    call.differentiate(backend, cotangents)
    assert_same_bits(given, before)
    assert_same_bits(cotangents, incoming)


@pytest.mark.grid(backends=REFERENCE)
def test_outputs_are_new_memory(case, option, backend, device, setting, size):
    """A state that is then updated in place must not change what the caller passed, nor the other output."""
    for length in (size["l"], 0) if setting.lengths is None else (size["l"],):
        call = case.call(option, {**size, "l": length}, setting).cast(widest(backend), device)
        outputs = call.run(backend)
        memory = [t.untyped_storage().data_ptr() for t in (*call.tensors.values(), *outputs.values()) if t.numel()]
        assert len(set(memory)) == len(memory)


def _transposed(tensor):
    return tensor.transpose(1, -1).contiguous().transpose(1, -1)


def _time_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _chunk(tensor):
    """The second half of a projection to twice the channels."""
    return torch.cat([torch.full_like(tensor, torch.nan), tensor], -1).chunk(2, -1)[1]


def _batch_last(tensor):
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _sliced(tensor):
    """Every second channel of a wider tensor, between other rows and tokens."""
    shape = [length + 2 for length in tensor.shape[:2]] + [2 * length + 1 for length in tensor.shape[2:]]
    view = tensor.new_full(shape, torch.nan)[1:-1, 1:-1]
    for axis in range(2, tensor.dim()):
        view = view.narrow(axis, 1, 2 * tensor.shape[axis])
        view = view[(slice(None),) * axis + (slice(None, None, 2),)]
    view.copy_(tensor)
    return view


def _expanded(axis):
    def layout(tensor):
        return tensor.narrow(axis, 0, 1).expand_as(tensor)

    return layout


def _offset(tensor):
    """Not aligned to more than one element."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "time first": _time_first,
    "chunk": _chunk,
    "transposed": _transposed,
    "batch last": _batch_last,
    "sliced": _sliced,
    "offset": _offset,
    "expanded batch": _expanded(0),
    "expanded time": _expanded(1),
    "expanded channels": _expanded(-1),
}


def _strided(case, option, backend, device, size):
    """A call with an initial state, from the right, where the operation has them."""
    setting = Setting("strided", h0=case.has(option, "h0"), reverse=case.has(option, "reverse"))
    call = case.call(option, size, setting).cast(widest(backend), device)
    return call, draw_cotangents(call.run(backend))


def _dense(call, cotangents, backend):
    dense = call.each(torch.Tensor.contiguous, tuple(call.tensors))
    return dense.differentiate(backend, {name: cotangent.contiguous() for name, cotangent in cotangents.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.grid(first=True, interpret="first")
def test_strides(case, option, backend, device, size, layout):
    """Of the inputs (b, l, ...), of the initial state, and of both incoming gradients."""
    change = LAYOUTS[layout]
    call, cotangents = _strided(case, option, backend, device, size)
    changed = {name: change(cotangent) for name, cotangent in cotangents.items()}
    strided = call.each(change, (*case.sequence, "h0"))
    assert_close(strided.differentiate(backend, changed), _dense(strided, changed, backend), widest(backend))


# These keep the channels adjacent: some kernels copy a tensor where they are not.
@pytest.mark.parametrize("layout", ["time first", "chunk"])
@pytest.mark.grid(first=True)
def test_strides_of_one_tensor(case, option, backend, device, size, layout):
    """Each by itself: none is read with another's strides."""
    change = LAYOUTS[layout]
    call, cotangents = _strided(case, option, backend, device, size)
    expected = _dense(call, cotangents, backend)
    for name in {*case.sequence, "h0"} & {*call.tensors}:
        assert_close(call.each(change, (name,)).differentiate(backend, cotangents), expected, widest(backend))
    for name, cotangent in cotangents.items():
        changed = cotangents | {name: change(cotangent)}
        assert_close(call.differentiate(backend, changed), expected, widest(backend))
