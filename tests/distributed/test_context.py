"""Context parallelism against one process: outputs, states and all gradients, on the CPU with gloo."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Calls, start

import ssmscan
from ssmscan.backend import why_not
from ssmscan.distributed import context_parallel
from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, Setting

# Of these sizes are the stretches of the ranks, for a sequence of 23 tokens.
SHARDS = {2: [(9, 14)], 4: [(0, 11, 1, 11), (2, 1, 1, 19)]}
# The second is interpreted.
BACKENDS = ("auto", "triton")[: 1 + (why_not("triton", "cpu", torch.float32) is None)]
SETTINGS = (
    PLAIN,
    Setting("h0_reverse", h0=True, reverse=True),
    Setting("packed", h0=True, lengths=(5, 0, 13, 1, 4)),
    Setting("packed_reverse", reverse=True, lengths=(1, 1, 21)),
    Setting("packed_zeros", lengths=(9, 3, 11)),
)


def _rows():
    """Every way to call every operation along a sequence, in every setting."""
    for case in CASES:
        for option in case.options:
            if "cumsum_log_a" in option.tensors or case.name == "gated_rms_norm":
                continue
            for setting in SETTINGS:
                packed = setting.lengths is not None
                if case.has(option, *setting.needs) and not (packed and option.keywords.get("scale_first") is False):
                    yield case, option, setting


def _call(case, option, setting):
    size = {**case.sizes[0], "b": 2, "l": 23}
    return case.call(option, size, setting)


def _weights(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def _whole(case, call):
    """One process: y, h and gradients."""
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in call.tensors.items()}
    y, h = _pair(case.op(**tensors, **call.keywords))
    loss = (y * _weights(y, 5)).sum() + (h * _weights(h, 6).conj()).sum().real
    gradients = torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)
    return {"y": y.detach(), "h": h.detach()} | {f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}


def _pair(result):
    """y and h, which is nothing where an operation returns y alone."""
    return result if isinstance(result, tuple) else (result, result.new_zeros(0))


def _worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    results = []
    for case, option, setting in _rows():
        for lengths in SHARDS[ranks]:
            call = _call(case, option, setting)
            own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
            tensors = {
                name: (tensor[:, own] if name in case.sequence else tensor).clone().requires_grad_()
                for name, tensor in call.tensors.items()
            }
            y, h = _pair(context_parallel(case.op, **tensors, **call.keywords))
            whole = torch.empty(y.shape[0], 23, *y.shape[2:], dtype=y.dtype)
            loss = (y * _weights(whole, 5)[:, own]).sum()
            if rank == 0:
                loss = loss + (h * _weights(h, 6).conj()).sum().real
            gradients = torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)
            results.append(
                {"y": y.detach(), "h": h.detach()} | {f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}
            )
    if ranks == 2:
        _grows_from_nothing(rank)
        _is_compiled_around()
        _only_h0_has_a_gradient(rank)
    else:
        _kernels_of_a_halo(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _grows_from_nothing(rank):
    """A stretch whose decays overflow leaves a state of zero what it is, as one process does."""
    x = torch.zeros(1, 300, 2)
    x[:, -3:] = 1.0
    decays = torch.full_like(x, 2.0)
    own = slice(100 * rank, 100 + 200 * rank)
    rates, ones = torch.ones(2, 1), torch.ones(1, 300, 1)
    for op, along, rest, backends in (
        (ssmscan.linear_scan, (x, decays), (), 1),
        (ssmscan.selective_scan, (x, torch.ones_like(x)), (rates, ones, ones), 2),
        (ssmscan.ssd, (x[..., None], torch.ones_like(x)), (rates[:, 0], ones[..., None], ones[..., None]), 2),
    ):
        expected, last = op(*along, *rest)
        assert expected.isfinite().all()
        stretches = [part[:, own] if part.shape[:2] == (1, 300) else part for part in (*along, *rest)]
        for backend in BACKENDS[:backends]:
            y, h = context_parallel(op, *stretches, backend=backend)
            assert torch.allclose(y, expected[:, own], rtol=1e-5)
            assert torch.allclose(h, last, rtol=1e-5)


def _kernels_of_a_halo(rank):
    """As many for four ranks as for two, forward and backward."""
    x, taps = torch.randn(1, 6, 4, requires_grad=True), torch.randn(4, 3)
    counts = []
    for group in (dist.new_group([0, 1]), dist.group.WORLD):
        if rank < dist.get_world_size(group):
            for packing in (None, torch.tensor([0, 4, 6 * dist.get_world_size(group)])):
                with Calls() as calls:
                    y, _ = context_parallel(ssmscan.causal_conv1d, x, taps, cu_seqlens=packing, group=group)
                    torch.autograd.grad(y.sum(), x)
                counts.append(calls.counts)
    if rank == 1:
        assert counts[:2] == counts[2:]


def _only_h0_has_a_gradient(rank):
    """No rank waits in the backward for one that does not come."""
    x, taps = torch.randn(1, 6, 4), torch.randn(4, 3)
    for lengths in ((5, 1), (1, 5)):
        h0 = torch.randn(1, 2, 4, requires_grad=True)
        y, h = context_parallel(ssmscan.causal_conv1d, x.split(lengths, 1)[rank], taps, h0=h0)
        (y.sum() + h.sum()).backward()
        # It is met by the taps behind it.
        assert rank == 1 or torch.allclose(h0.grad, torch.stack([taps[:, 0], taps[:, :2].sum(1)])[None])
    half, ones = torch.full((1, 6, 4), 0.5), torch.ones(1, 6, 1)
    own = slice(2) if rank == 0 else slice(2, 6)
    for op, along, rest, state in (
        (ssmscan.linear_scan, (x, half), (), (1, 4)),
        (ssmscan.selective_scan, (x, half.log().neg()), (-torch.ones(4, 1), ones, ones), (1, 4, 1)),
    ):
        h0 = torch.ones(state, requires_grad=True)
        given = [tensor[:, own] if tensor.shape[:2] == (1, 6) else tensor for tensor in (*along, *rest)]
        y, h = context_parallel(op, *given, h0=h0)
        (y.sum() + h.sum()).backward()
        # Both ranks have the last state.
        assert rank == 1 or torch.allclose(h0.grad, torch.full_like(h0, sum(0.5**t for t in (1, 2, 3, 4, 5, 6, 6, 6))))


def _is_compiled_around():
    """Within what is compiled it does what it does without."""
    x, taps = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def doubled(x, taps):
        return context_parallel(ssmscan.causal_conv1d, 2 * x, taps)[0].sin()

    results = []
    for function in (doubled, torch.compile(doubled, backend="aot_eager")):
        tensors = [tensor.clone().requires_grad_() for tensor in (x, taps)]
        y = function(*tensors)
        results.append([y, *torch.autograd.grad(y.sum(), tensors)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.fixture(scope="module", params=sorted(SHARDS), ids=lambda ranks: f"{ranks} ranks")
def ran(request, tmp_path_factory):
    """The results of all ranks: one start of processes for all rows."""
    folder = tmp_path_factory.mktemp("ranks")
    start(_worker, request.param, folder)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
    rows = [(*row, lengths) for row in _rows() for lengths in SHARDS[request.param]]
    return list(zip(rows, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name != "gated_rms_norm"])
def test_the_ranks_make_what_one_process_makes(ran, name):
    checked = 0
    for (case, option, setting, lengths), results in ran:
        if case.name != name:
            continue
        checked += 1
        label = f"{option.name} {setting.name} {lengths}"
        for part, expected in _whole(case, _call(case, option, setting)).items():
            found = [result[part] for result in results]
            if part == "y" or part.removeprefix("d") in case.sequence:
                whole = torch.cat(found, 1)
            elif part == "h":
                assert all(torch.equal(h, found[0]) for h in found), label
                whole = found[0]
            else:
                whole = sum(found)
            bound = 1e-10 * max(expected.abs().max().item() if expected.numel() else 1.0, 1.0)
            assert (whole - expected).abs().max().item() <= bound if expected.numel() else True, f"{label} {part}"
    assert checked > 0


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_refusals(alone):
    x = torch.ones(1, 3, 2)
    with pytest.raises(NotImplementedError, match=r"context_parallel: op must be one of linear_scan, .*, got relu"):
        context_parallel(torch.relu, x)
    with pytest.raises(NotImplementedError, match="cumsum_log_a must be None"):
        context_parallel(ssmscan.matrix_scan, x[..., None], cumsum_log_a=-x)
    bounds = torch.tensor([0, 3])
    with pytest.raises(NotImplementedError, match="scale_first must be True with cu_seqlens"):
        context_parallel(ssmscan.rg_lru, x, x, x, torch.ones(2), scale_first=False, cu_seqlens=bounds)
    for bounds in map(torch.tensor, ([0, 4], [1, 3], [0, 2, 1, 3])):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 3 tokens of all ranks"):
            context_parallel(ssmscan.linear_scan, x, x, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="linear_scan: "):
        context_parallel(ssmscan.linear_scan, x, x[:, :2])
    A, B = -torch.ones(2, 1), torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match="selective_scan: dt must have shape"):
        context_parallel(ssmscan.selective_scan, x, x[:, :2], A, B, B)
    with pytest.raises(ValueError, match="ssd: dt must have shape"):
        context_parallel(ssmscan.ssd, x[..., None], x[:, :2], A[:, 0], B[..., None], B[..., None])
    with pytest.raises(TypeError, match="selective_scan: A_is_log must be True or False, got 'no'"):
        context_parallel(ssmscan.selective_scan, x, x, A, B, B, A_is_log="no")
    with pytest.raises(TypeError, match="selective_scan: A must be float32, bfloat16"):
        context_parallel(ssmscan.selective_scan, x, x, A.long(), B, B, A_is_log=True)
