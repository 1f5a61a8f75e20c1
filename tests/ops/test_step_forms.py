"""What holds of every decode step, whichever way it takes: several tokens, pools of states, transforms, refusals."""

import pytest
import torch
from step_table import ALL, CASES, FIRST, LINEAR_SCAN, each, narrow, one_token, some_tokens, wide

from recorder import Recorder
from ssmscan.ops import decoding
from ssmscan.testing import same_bits

# The dtypes of the state and of the indices, if any, and how many tokens; None is one without an axis for them.
FORMS = [(torch.bfloat16, torch.int32, 3), (torch.float32, torch.int64, None)]
MORE_FORMS = [(torch.float16, None, 2), (torch.float32, None, 3), (torch.float16, torch.int64, 1)]


def _form(case, option, form, place):
    """The tensors of a step, the states of three batch rows, these in a pool, and the keywords of its step."""
    dtype, index_dtype, l = form
    given, h = some_tokens(case, option, {"b": 3, "l": l or 1}, torch.float32, place)
    if l is None:
        given = each(case, given, lambda tensor: tensor[:, 0])
    h = narrow(h, dtype)
    if index_dtype is None:
        return given, h, h.clone(), option.keywords
    # The second batch row is skipped. What must not be read is NaN.
    given = each(case, given, lambda tensor: tensor.index_fill(0, torch.tensor(1, device=place), torch.nan))
    pool = h.new_full((5, *h.shape[1:]), torch.nan)
    pool[[3, 0]] = h[[0, 2]]
    indices = torch.tensor([3, -1, 0], dtype=index_dtype, device=place)
    return given, h, pool, option.keywords | {"state_indices": indices}


def _check_form(case, option, form, place, launches):
    """A step against steps of one token, each batch row with its own state: the same bits."""
    _, index_dtype, l = form
    given, h, pool, keywords = _form(case, option, form, place)
    kept, rows = ([0, 1, 2], [0, 1, 2]) if index_dtype is None else ([0, 2], [3, 0])
    ys = []
    for t in range(l or 1):
        token = each(case, given, lambda tensor, t=t: (tensor[:, t] if l else tensor).clone())
        ys.append(case.step(**token, **option.keywords, h=h))
    launched = len(launches)
    y = case.step(**given, **keywords, h=pool)
    assert launches[launched:] == launches[:1], "not one launch"
    expected = torch.zeros_like(y)
    expected[kept] = torch.stack(ys, 1)[kept] if l else ys[0][kept]
    assert torch.equal(y, expected)
    assert torch.equal(pool[rows], h[kept])
    assert all(pool[row].isnan().all() for row in range(len(pool)) if row not in rows)


@pytest.mark.parametrize("form", FORMS, ids=str)
@ALL
def test_forms(case, option, form, place, launches, poisoned):
    _check_form(case, option, form, place, launches)


@pytest.mark.parametrize("form", MORE_FORMS, ids=str)
@FIRST
def test_more_forms(case, form, place, launches, poisoned):
    _check_form(case, case.options[0], form, place, launches)


@FIRST
def test_left_to_pytorch(case, device, launches):
    """Derivatives, float64, and a state that lies several times in the same place, which cannot be updated."""
    option = case.options[0]
    given, h = one_token(case, option, {}, torch.float32, device)
    leaf = given["x"].clone().requires_grad_()
    y = case.step(**{**given, "x": leaf}, **option.keywords, h=h.clone())
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert gradient.isfinite().all()
    widened = {name: wide(tensor) for name, tensor in given.items()}
    assert case.step(**widened, **option.keywords, h=wide(h)).dtype is torch.float64
    with pytest.raises(RuntimeError, match="more than one element"):
        case.step(**given, **option.keywords, h=h[:1].expand(h.shape))
    assert not launches
    with torch.no_grad():
        case.step(**{**given, "x": leaf}, **option.keywords, h=h)
    assert len(launches) == 1


@FIRST
def test_a_saved_state_is_missed(case, device):
    """As after an update by PyTorch: a derivative that needs the state before it must not take the one after it."""
    given, h = one_token(case, case.options[0], {}, torch.float32, device)
    weight = torch.ones_like(h).requires_grad_()
    product = (weight * h).sum()
    with torch.no_grad():
        case.step(**given, **case.options[0].keywords, h=h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        case.step(**given, **case.options[0].keywords, h=h.clone())


@FIRST
def test_registered_operator(case, device):
    given, _, pool, keywords = _form(case, case.options[0], FORMS[0], device)
    recorded = pool.clone()
    y = case.step(**given, **keywords, h=pool)
    with Recorder() as recorder:
        assert same_bits(case.step(**given, **keywords, h=recorded), y)
    assert same_bits(recorded, pool)
    ((operator, arguments, _),) = recorder.calls
    torch.library.opcheck(operator, tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case is LINEAR_SCAN else pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_compiled(case, place):
    """In one graph, as in eager mode."""
    given, _, pool, keywords = _form(case, case.options[0], FORMS[0], place)
    before = pool.clone()
    y = case.step(**given, **keywords, h=pool)
    torch.compiler.reset()
    compiled = torch.compile(case.step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert same_bits(compiled(**given, **keywords, h=before), y)
    assert same_bits(before, pool)


@FIRST
def test_derivatives(case):
    """Of a pool: those of steps with the states that are not skipped; the other states pass through."""
    option = case.options[0]
    given, _, pool, _ = _form(case, option, (torch.float32, torch.int64, 2), "cpu")
    leaves = {name: wide(tensor).nan_to_num().requires_grad_() for name, tensor in (given | {"h": pool}).items()}
    weights = [torch.arange(leaf.numel()).sin().to(leaf).view(leaf.shape) for leaf in (leaves["x"], leaves["h"])]

    def gradients(run):
        results = run(leaves["h"].clone(), {name: leaf for name, leaf in leaves.items() if name != "h"})
        total = sum((result * weight).sum().real for result, weight in zip(results, weights, strict=True))
        return torch.autograd.grad(total, leaves.values(), materialize_grads=True)

    def pooled(h, tensors, indices=(3, -1, 0)):
        return case.step(**tensors, **option.keywords, h=h, state_indices=torch.tensor(indices)), h

    def alone(h, tensors):
        own = h[[3, 0]]
        y = case.step(**each(case, tensors, lambda tensor: tensor[[0, 2]]), **option.keywords, h=own)
        return torch.stack([y[0], torch.zeros_like(y[0]), y[1]]), torch.stack([own[1], h[1], h[2], own[0], h[4]])

    for gradient, expected in zip(gradients(pooled), gradients(alone), strict=True):
        torch.testing.assert_close(gradient, expected)
    *rest, last = gradients(lambda h, tensors: pooled(h, tensors, (-1, -1, -1)))
    assert not any(gradient.any() for gradient in rest)
    assert torch.equal(last, weights[1])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@FIRST
def test_what_is_no_row_is_skipped(case, kind, place, monkeypatch):
    """Where the indices are not read on the host; nothing is written elsewhere."""
    monkeypatch.setattr(decoding, "observed", lambda tensors: True)
    given, h, _, _ = _form(case, case.options[0], (torch.float32, None, None), place)
    buffer = h.new_full((64, *h.shape[1:]), torch.nan)
    pool = buffer[32:35].copy_(h)
    indices = torch.tensor([3, -2, 1], dtype=kind, device=place)
    y = case.step(**given, **case.options[0].keywords, h=pool, state_indices=indices)
    assert not y[:2].any()
    assert y[2].any()
    assert torch.equal(pool[[0, 2]], h[[0, 2]])
    assert not torch.equal(pool[1], h[1])
    pool.fill_(torch.nan)
    assert buffer.isnan().all(), "written outside of the pool"


@FIRST
def test_a_pool_of_no_states(case, place):
    given, h, _, _ = _form(case, case.options[0], (torch.float32, None, None), place)
    nothing = torch.full((3,), -1, device=place)
    assert not case.step(**given, **case.options[0].keywords, h=h[:0], state_indices=nothing).any()


@FIRST
def test_refused_states(case):
    given, h, _, _ = _form(case, case.options[0], (torch.float32, None, None), "cpu")
    rows = torch.arange(3)

    def refuses(error, *parts, **changes):
        with pytest.raises(error) as caught:
            case.step(**given | {"h": h} | changes, **case.options[0].keywords)
        assert str(caught.value).startswith(f"{case.name}_step: ")
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    refuses(TypeError, "h must be a torch.Tensor, got NoneType", h=None)
    refuses(TypeError, "h must be float32, bfloat16, float16 or float64, got torch.int64", h=h.real.long())
    refuses(TypeError, "state_indices must be a torch.Tensor, got list", state_indices=[0, 1, 2])
    refuses(TypeError, "state_indices must be int32 or int64, got torch.float32", state_indices=rows.float())
    refuses(ValueError, "state_indices must have shape (b) = (3,)", "got (2,)", state_indices=rows[:2])
    refuses(ValueError, "state_indices must be on the device of h, cpu", "meta", state_indices=rows.to("meta"))
    refuses(ValueError, "state_indices must be rows of h, below 3, or -1", "got 3", state_indices=rows + 1)
    refuses(ValueError, "state_indices must be rows of h, below 3, or -1", "got -2", state_indices=rows - 2)
    refuses(ValueError, "h must have shape (rows, ", str(tuple(h.shape)), h=h[..., None], state_indices=rows)
    refuses(ValueError, "x must have shape (b, ", " or (b, l, ", x=given["x"][None, None])


@pytest.mark.gpu
@FIRST
def test_cuda_graph_of_a_pool(case):
    """A replay reads the indices anew."""
    given, _, pool, keywords = _form(case, case.options[0], FORMS[0], "cuda")
    indices, before = keywords["state_indices"], pool.clone()
    case.step(**given, **keywords, h=pool)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.step(**given, **keywords, h=pool)
    for other in ([3, -1, 0], [-1, -1, 3], [0, 4, -1]):
        indices.copy_(torch.tensor(other))
        pool.copy_(before)
        graph.replay()
        replayed = y.clone(), pool.clone()
        pool.copy_(before)
        assert same_bits(case.step(**given, **keywords, h=pool), replayed[0])
        assert same_bits(pool, replayed[1])
