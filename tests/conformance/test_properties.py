"""What holds for any input: linearity, causality, and different ways to run the same sequences."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmscan.testing import Setting, assert_close, assert_same_bits, differentiate, same_bits, widest

SEEDS = st.integers(0, 2**16)
LENGTHS = st.lists(st.sampled_from((0, 1, 2, 15, 16, 17)), min_size=1, max_size=3).map(tuple)


def _setting(case, option, **wanted):
    """A setting with an initial state if the operation takes one."""
    return Setting("drawn", h0=case.has(option, "h0"), **wanted)


@pytest.mark.grid(needs=("linear",))
@given(seed=SEEDS, factor=st.floats(-4, 4))
def test_linear(case, option, backend, device, size, seed, factor):
    setting = _setting(case, option)
    one = case.call(option, size, setting, seed).cast(widest(backend), device)
    other = case.call(option, size, setting, seed + 1).cast(widest(backend), device)
    names = ({*case.linear} & {*option.tensors}) | {*one.tensors} & {"h0"}
    other = one.replace(**{name: other.tensors[name] for name in names})
    total = one.replace(**{name: one.tensors[name] + factor * other.tensors[name] for name in names})
    y, z = one.run(backend), other.run(backend)
    assert_close(total.run(backend), {name: y[name] + factor * z[name] for name in y}, widest(backend))


@pytest.mark.grid(needs=("causal",))
@given(seed=SEEDS, data=st.data())
def test_causal(case, option, backend, device, size, reverse, seed, data):
    """Other inputs from a token on change that token's y, and no bit of an earlier one."""
    setting = _setting(case, option, reverse=reverse)
    t = data.draw(st.integers(0, size["l"] - 1))
    call = case.call(option, size, setting, seed).cast(widest(backend), device)
    other = case.call(option, size, setting, seed + 1).cast(widest(backend), device)
    past, now = (slice(t + 1, None), slice(t + 1)) if reverse else (slice(t), slice(t, None))
    changed = {name: call.tensors[name].clone() for name in call.tensors if name in case.sequence}
    for name, tensor in changed.items():
        tensor[:, now] = other.tensors[name][:, now]
    before, after = call.run(backend)["y"], call.replace(**changed).run(backend)["y"]
    assert same_bits(before[:, past], after[:, past])
    assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.grid(needs=("h0", "split"))
@given(seed=SEEDS, data=st.data())
def test_split_and_carry(case, option, backend, device, size, reverse, seed, data):
    """Two pieces, the second from the state that the first left; gradients flow back through that state."""
    k = data.draw(st.integers(0, size["l"]))
    call = case.call(option, size, _setting(case, option, reverse=reverse), seed).cast(widest(backend), device)

    def in_pieces(call):
        pieces = [call.each(lambda t: t[:, :k]), call.each(lambda t: t[:, k:])]
        first, second = reversed(pieces) if reverse else pieces
        one = first.run(backend)
        two = second.replace(h0=one["h"]).run(backend)
        ys = (two["y"], one["y"]) if reverse else (one["y"], two["y"])
        return {"y": torch.cat(ys, 1), "h": two["h"]}

    assert_close(differentiate(in_pieces, call), call.differentiate(backend), widest(backend))


@pytest.mark.grid(needs=("reverse",))
@given(seed=SEEDS, lengths=st.none() | LENGTHS)
def test_reverse_is_flipped(case, option, backend, device, size, seed, lengths):
    if lengths is not None and not case.has(option, "cu_seqlens"):
        lengths = None
    setting = _setting(case, option, reverse=True, lengths=lengths)
    call = case.call(option, size, setting, seed).cast(widest(backend), device)

    def flipped(call):
        """Packed sequences, too, come in the opposite order."""
        call = call.set(reverse=None).each(lambda t: t.flip(1))
        if lengths is None:
            outputs = call.run(backend)
            return outputs | {"y": outputs["y"].flip(1)}
        bounds = call.keywords["cu_seqlens"]
        call = call.set(cu_seqlens=bounds[-1] - bounds.flip(0)).each(lambda h: h.flip(0), ("h0",))
        outputs = call.run(backend)
        return {name: v.flip(1 if name == "y" else 0) for name, v in outputs.items()}

    assert_close(differentiate(flipped, call), call.differentiate(backend), widest(backend))


@pytest.mark.grid(needs=("cu_seqlens",))
@given(seed=SEEDS, lengths=LENGTHS)
def test_packed_is_separate(case, option, backend, device, size, reverse, seed, lengths):
    """Every output and every gradient, those of arguments that hold for all sequences too."""
    setting = _setting(case, option, lengths=lengths, reverse=reverse)
    call = case.call(option, size, setting, seed).cast(widest(backend), device)
    bounds = call.keywords["cu_seqlens"].tolist()

    def separately(call):
        runs = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            alone = call.set(cu_seqlens=None).each(lambda t, start=start, end=end: t[:, start:end])
            runs.append(alone.each(lambda h, i=i: h[i : i + 1], ("h0",)).run(backend))
        return {name: torch.cat([run[name] for run in runs], 1 if name == "y" else 0) for name in runs[0]}

    assert_close(differentiate(separately, call), call.differentiate(backend), widest(backend))


@pytest.mark.grid(first=True)
@given(seed=SEEDS)
def test_batch_is_separate(case, option, backend, device, size, seed):
    call = case.call(option, size, _setting(case, option), seed).cast(widest(backend), device)

    def separately(call):
        runs = [call.each(lambda t, i=i: t[i : i + 1], (*case.sequence, "h0")).run(backend) for i in range(size["b"])]
        return {name: torch.cat([run[name] for run in runs]) for name in runs[0]}

    assert_close(differentiate(separately, call), call.differentiate(backend), widest(backend))


@pytest.mark.grid(needs=("h0", "step"), dtypes=(torch.float32, torch.bfloat16))
@given(seed=SEEDS, data=st.data())
def test_prefill_then_steps(case, option, backend, device, dtype, size, seed, data):
    """The step updates the state in place, and reads none but its own token."""
    # A rounded decay, applied k times, is off by k roundings.
    k = data.draw(st.integers(max(size["l"] - 100, 0), size["l"] - 1))
    call = case.call(option, size, _setting(case, option), seed).cast(dtype, device)
    whole = call.run(backend)
    outputs = call.each(lambda t: t[:, :k]).run(backend)
    ys, h = [outputs["y"]], outputs["h"]
    for t in range(k, size["l"]):
        token = call.each(lambda tensor, t=t: tensor[:, t])
        arguments = {name: tensor for name, tensor in token.tensors.items() if name != "h0"}
        given_h, memory = h, h.data_ptr()
        ys.append(case.step(**arguments, **call.keywords, h=h)[:, None])
        assert given_h is h
        assert h.data_ptr() == memory
    assert ys[-1].dtype is dtype
    assert_close({"y": torch.cat(ys, 1)}, {"y": whole["y"]}, dtype)
    assert_close({"h": h}, {"h": whole["h"]}, dtype if case.rounds else torch.float32)


@pytest.mark.grid(needs=("cu_seqlens",))
@given(seed=SEEDS, lengths=LENGTHS, data=st.data())
def test_documents_do_not_meet(case, option, backend, device, size, reverse, seed, lengths, data):
    """Another document in its place changes no bit of the others: outputs, states, gradients."""
    setting = _setting(case, option, lengths=lengths, reverse=reverse)
    call = case.call(option, size, setting, seed).cast(widest(backend), device)
    other = case.call(option, size, setting, seed + 1).cast(widest(backend), device)
    document = data.draw(st.integers(0, len(lengths) - 1))
    start, end = call.keywords["cu_seqlens"][document : document + 2].tolist()
    changed = {name: tensor.clone() for name, tensor in call.tensors.items()}
    for name, tensor in changed.items():
        if name in case.sequence:
            tensor[:, start:end] = other.tensors[name][:, start:end]
        elif name == "h0":
            tensor[document] = other.tensors[name][document]
    before, after = call.differentiate(backend), call.replace(**changed).differentiate(backend)

    def others(values):
        tokens = {n: torch.cat([v[:, :start], v[:, end:]], 1) for n, v in values.items() if n.lstrip("d") in tokenwise}
        states = {n: torch.cat([v[:document], v[document + 1 :]]) for n, v in values.items() if n in ("h", "dh0")}
        return tokens | states

    tokenwise = {"y", *case.sequence}
    assert_same_bits(others(before), others(after))
    assert start == end or not torch.equal(before["y"][:, start:end], after["y"][:, start:end])


@pytest.mark.grid(needs=("nan",))
@given(seed=SEEDS, data=st.data())
def test_nan_stays_at_home(case, option, backend, device, size, reverse, packed, seed, data):
    """It appears in its own sequence, future and channel; all else keeps its bits, in the gradients too."""
    setting = _setting(case, option, reverse=reverse, lengths=(3, 0, 17) if packed else None)
    call = case.call(option, size, setting, seed).cast(widest(backend), device)
    clean = call.differentiate(backend)
    batch, length = clean["y"].shape[:2]
    name = data.draw(st.sampled_from([name for name in call.tensors if name in case.sequence]))
    i, t = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, length - 1))
    tensor = call.tensors[name].clone()
    channel = (-1,) * (tensor.dim() - 2)
    tensor[(i, t, *channel)] = torch.nan
    dirty = call.replace(**{name: tensor}).differentiate(backend)

    number = torch.zeros(length, dtype=torch.long)
    if packed:
        number = torch.repeat_interleave(torch.arange(3), torch.tensor(setting.lengths))
    ours = number == number[t]
    future = torch.arange(length) <= t if reverse else torch.arange(length) >= t
    reached = torch.zeros(clean["y"].shape, dtype=torch.bool)
    reached[
        (i, ours & future if case.has(option, "causal") else ours, *(channel if name in case.channelwise else ()))
    ] = True
    assert dirty["y"].isnan().any()
    assert same_bits(dirty["y"].cpu()[~reached], clean["y"].cpu()[~reached])
    if "h" in clean:
        others = torch.arange(clean["h"].shape[0]) != (number[t] if packed else i)
        assert same_bits(dirty["h"].cpu()[others], clean["h"].cpu()[others])
    others = torch.ones(batch, length, dtype=torch.bool)
    others[i, ours] = False
    for gradient in (f"d{name}" for name in call.tensors if name in case.sequence):
        assert same_bits(dirty[gradient].cpu()[others], clean[gradient].cpu()[others])


@pytest.mark.grid(first=True, needs=("cu_seqlens",))
def test_cu_seqlens_is_read_at_each_call(case, option, backend, device, size):
    """Other bounds written into the same tensor count; int32 and int64 are the same."""
    call = case.call(option, size, _setting(case, option, lengths=(5, 20, 3))).cast(widest(backend), device)
    first = call.run(backend)
    bounds = call.keywords["cu_seqlens"]
    assert_same_bits(call.set(cu_seqlens=bounds.int()).run(backend), first)
    bounds[1] = 7
    assert_same_bits(call.run(backend), call.set(cu_seqlens=bounds.clone()).run(backend))
    assert not torch.equal(call.run(backend)["y"], first["y"])
