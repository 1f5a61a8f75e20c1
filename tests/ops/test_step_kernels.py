"""The kernels of the decode steps, which the step functions take on a GPU only: each against its step in float64.

Without a GPU the step functions are made to believe in one, and Triton interprets. What holds of every step, whichever
way it takes, is tested in plain PyTorch too.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssmscan.backend import choose, why_not
from ssmscan.ops import decoding
from ssmscan.ops._triton.launch import Kernel
from ssmscan.ops.causal_conv1d.case import CASE as CAUSAL_CONV1D
from ssmscan.ops.linear_scan.case import CASE as LINEAR_SCAN
from ssmscan.ops.matrix_scan.case import CASE as MATRIX_SCAN
from ssmscan.ops.rg_lru.case import CASE as RG_LRU
from ssmscan.ops.s4d.case import CASE as S4D
from ssmscan.ops.selective_scan.case import CASE as SELECTIVE_SCAN
from ssmscan.ops.ssd.case import CASE as SSD
from ssmscan.ops.ssd.case import ELEMENTWISE
from ssmscan.testing import rms_ratio, same_bits

CASES = (CAUSAL_CONV1D, LINEAR_SCAN, MATRIX_SCAN, RG_LRU, SELECTIVE_SCAN, SSD, S4D)
OPTIONS = [
    (case, option)
    for case in CASES
    for option in case.options
    if case.has(option, "step") and option.name != "conv, complex"
]
OPTIONS += [(SSD, ELEMENTWISE)]
# Beside the cases' own: several programs of a channel axis, and tiles without a mask.
SIZES = {
    "causal_conv1d": ({"b": 2, "d": 130, "w": 2}, {"b": 1, "d": 128, "w": 8}),
    "linear_scan": ({"b": 2, "d": 130},),
    "matrix_scan": ({"b": 2, "r": 9, "c": 64}, {"b": 2, "r": 2, "c": 514}),
    "rg_lru": ({"b": 2, "d": 130},),
    "selective_scan": ({"b": 2, "d": 66, "n": 16}, {"b": 1, "d": 6, "n": 256}, {"b": 1, "d": 514, "n": 1}),
    "ssd": ({"b": 1, "h": 2, "p": 35, "g": 1, "n": 128}, {"b": 2, "h": 1, "p": 1, "g": 1, "n": 300}),
    "s4d": ({"b": 2, "d": 9, "n": 64}, {"b": 1, "d": 1, "n": 100}),
}
# The dtypes of the state and of the indices, if any, and how many tokens; None is one without an axis for them.
FORMS = [(torch.bfloat16, torch.int32, 3), (torch.float32, torch.int64, None)]
MORE_FORMS = [(torch.float16, None, 2), (torch.float32, None, 3), (torch.float16, torch.int64, 1)]
# Errors over the root-mean-square of the oracle.
BOUND = {torch.float32: 4e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
FIRST = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ALL = pytest.mark.parametrize(("case", "option"), OPTIONS, ids=lambda value: value.name.replace(" ", "_"))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    return _device(request.param, monkeypatch)


@pytest.fixture(params=["plain", "cpu", CUDA])
def place(request, monkeypatch):
    """The device of a kernel, or of plain PyTorch."""
    return "cpu" if request.param == "plain" else _device(request.param, monkeypatch)


def _device(name, monkeypatch):
    if why_not("triton", name, torch.float32) is not None:
        pytest.skip("the kernels are interpreted where there is no GPU")
    if name == "cpu":
        _pretend(monkeypatch.setattr)
    return name


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names = []

    def launch(kernel, *arguments, launch=Kernel.launch):
        names.append(kernel.function.__name__)
        launch(kernel, *arguments)

    monkeypatch.setattr(Kernel, "launch", launch)
    return names


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _pretend(setattr):
    setattr(decoding, "choose", lambda function, backend, _, dtype: choose(function, backend, "cuda", dtype))


def _wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _token(case, option, size, dtype, device, extreme=None):
    """The tensors of one token and a state, as a user would pass them at ``dtype``."""
    given, h = _tokens(case, option, {**size, "l": 1}, dtype, device, extreme)
    return _each(case, given, lambda tensor: tensor[:, 0]), h


def _tokens(case, option, size, dtype, device, extreme=None):
    """The tensors of several tokens and a state."""
    size = {**case.sizes[0], **size}
    tensors = case.draw(size, option, extreme=extreme)
    state = case.draw_state(size, size["b"], dtype=torch.complex128)
    # Complex poles make a complex state.
    is_complex = any(tensor.is_complex() for tensor in tensors.values())
    h = (state if is_complex else state.real).to(device, torch.complex64 if is_complex else torch.float32)
    return case.cast(tensors, dtype, device), h


def _each(case, given, function):
    """With ``function`` applied to what each token has of its own."""
    return {name: function(tensor) if name in case.sequence else tensor for name, tensor in given.items()}


def _narrow(h, dtype):
    """There are no narrow complex states."""
    return h if h.is_complex() else h.to(dtype)


def _check(case, option, given, h, launches):
    """One step by the kernel against one in float64; the states at ``h`` are changed."""
    oracle_h = _wide(h).clone()
    oracle = case.step(**{name: _wide(t) for name, t in given.items()}, **option.keywords, h=oracle_h)
    assert not launches, "the oracle is no oracle"
    inputs, memory = {name: tensor.clone() for name, tensor in given.items()}, h.data_ptr()
    y = case.step(**given, **option.keywords, h=h)
    assert len(launches) == 1
    assert (y.dtype, y.shape, h.data_ptr()) == (given["x"].dtype, given["x"].shape, memory)
    errors = {"y": rms_ratio(y, oracle), "h": rms_ratio(h, oracle_h)}
    bounds = {"y": BOUND[y.dtype], "h": BOUND[h.real.dtype]}
    assert all(errors[name] <= bounds[name] for name in errors), f"{errors} above {bounds}"
    assert all(torch.equal(inputs[name], given[name]) for name in given), "an input changed"
    if h.dtype.itemsize == 2:
        # Rounded once. In float32 a state can be on the other side of what lies between two numbers.
        assert (h == oracle_h.to(h.dtype)).double().mean() > 0.98


@ALL
def test_sizes(case, option, device, launches, poisoned):
    for size in (*case.sizes, *SIZES[case.name]):
        _check(case, option, *_token(case, option, size, torch.float32, device), launches)
        launches.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_all_in_half_precision(case, option, dtype, device, launches, poisoned):
    """Parameters too, but for complex ones; the state is kept in float32."""
    given, h = _token(case, option, {}, dtype, device)
    given = {name: tensor if tensor.is_complex() else tensor.to(dtype) for name, tensor in given.items()}
    _check(case, option, given, h, launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_narrow_states(case, option, dtype, device, launches):
    given, h = _token(case, option, {}, torch.float32, device)
    _check(case, option, given, _narrow(h, dtype), launches)


def _form(case, option, form, place):
    """The tensors of several tokens, the states of three batch rows, these in a pool, and the keywords of its step."""
    dtype, index_dtype, l = form
    given, h = _tokens(case, option, {"b": 3, "l": l or 1}, torch.float32, place)
    h = _narrow(h, dtype)
    if index_dtype is None:
        return given, h, h.clone(), option.keywords
    # The second batch row is skipped. What must not be read is NaN.
    given = _each(case, given, lambda tensor: tensor.index_fill(0, torch.tensor(1, device=place), torch.nan))
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
        token = _each(case, given, lambda tensor, t=t: tensor[:, t].clone())
        ys.append(case.step(**token, **option.keywords, h=h))
    launched = len(launches)
    y = case.step(**(given if l else token), **keywords, h=pool)
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


EXTREMES = [(case, option, extreme) for case, option in OPTIONS for extreme in case.extremes]


@pytest.mark.parametrize(("case", "option", "extreme"), EXTREMES, ids=lambda value: getattr(value, "name", value))
def test_extremes(case, option, extreme, device, launches):
    _check(case, option, *_token(case, option, {}, torch.float32, device, extreme), launches)


def _placed(tensor, backwards):
    """A copy inside of a wider buffer of NaN, the axes in order or ``backwards``, and the buffer."""
    axes = list(range(tensor.dim()))[:: -1 if backwards else 1]
    shape = [tensor.shape[axis] + 3 for axis in axes]
    buffer = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(1, length - 2) for length in shape)].permute(axes)
    return view.copy_(tensor), buffer


@pytest.mark.parametrize("layout", ["sliced", "backwards", "expanded"])
@ALL
def test_layouts(case, option, layout, device, launches, poisoned):
    """Inputs and state as views: what lies between their elements is neither read nor written."""
    given, h = _token(case, option, {}, torch.float32, device)
    backwards = layout == "backwards"
    for name, tensor in given.items():
        if layout == "expanded":
            given[name] = _placed(tensor[:1], False)[0].expand(tensor.shape)
        else:
            given[name] = _placed(tensor, backwards)[0]
    h, buffer = _placed(h, backwards)
    _check(case, option, given, h, launches)
    h.fill_(torch.nan)
    assert buffer.isnan().all(), "written outside of the state"


@pytest.mark.parametrize("option", S4D.options[:2], ids=lambda option: option.name)
def test_several_rows_of_a_program(option, device, launches, monkeypatch):
    monkeypatch.setattr(import_module("ssmscan.ops.s4d.kernel_step"), "PROGRAMS", 4)
    _check(S4D, option, *_token(S4D, option, {"b": 7, "d": 9, "n": 64}, torch.float32, device), launches)


@pytest.mark.parametrize("names", ["ABC", "h", "ABCh"])
def test_lazy_conjugates(names, device, launches):
    """Which PyTorch leaves to whoever reads them, or writes."""
    option = S4D.options[1]
    given, h = _token(S4D, option, {}, torch.float32, device)
    given = {name: tensor.conj() if name in names else tensor for name, tensor in given.items()}
    _check(S4D, option, given, h.conj() if "h" in names else h, launches)


@pytest.mark.parametrize("dt", [1.0, 0.37, 1e-4])
def test_hold(dt, device, launches):
    """exp(dt·A) and (exp(dt·A) - 1)/A, each to its last digit: after a thousand steps the errors have added up."""
    rates = torch.tensor([0.0, -1e-7, -1e-3, -0.1, -0.4, -3.0, -40.0, 0.3])
    angles = torch.cat([torch.linspace(-7.0, 7.0, 200), torch.tensor([1e-6, 6.2831855, 99.0, 12345.6])])
    A = torch.complex(*torch.meshgrid(rates, angles, indexing="ij")).to(device)
    # One row keeps a state of 1, the other is given an input of 1.
    h = torch.stack([torch.ones_like(A), torch.zeros_like(A)])
    x = torch.tensor([[0.0], [1.0]], device=device).expand(2, len(rates))
    step, one = torch.full((len(rates),), dt, device=device), torch.ones_like(A)
    exact = _wide(h)
    S4D.step(x=x.double(), dt=step.double(), A=_wide(A), B=_wide(one), C=_wide(one), h=exact)
    S4D.step(x=x, dt=step, A=A, B=one, C=one, h=h)
    assert len(launches) == 1
    # Half a unit of rounding; after whole turns little is left of the second, which so has a unit of its own.
    allowed = 6.1e-8 * exact.abs() + torch.tensor([0.0, 3e-9 * dt], device=device)[:, None, None]
    assert ((h - exact).abs() <= allowed).all()


# NumPy warns of the padding, where the interpreter multiplies infinity by 0.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_an_infinite_input(case, device):
    """Leaves no NaN: the states that pad a tile do not count."""
    given, h = _token(case, case.options[0], {}, torch.float32, device)
    given = {name: tensor if name == "A" else tensor.abs() for name, tensor in given.items()}
    given["x"] = torch.full_like(given["x"], torch.inf)
    assert case.step(**given, **case.options[0].keywords, h=h).isposinf().all()
    assert h.isposinf().all()


@FIRST
def test_nothing(case, device):
    given, h = _token(case, case.options[0], {"b": 0}, torch.float32, device)
    assert case.step(**given, **case.options[0].keywords, h=h).shape == given["x"].shape


@pytest.mark.parametrize("case", [SSD, S4D], ids=lambda case: case.name)
def test_no_states(case, device, launches):
    given, h = _token(case, case.options[0], {"n": 0}, torch.float32, device)
    gate = torch.nn.functional.silu(given["z"]) if "z" in given else 1
    D = given["D"].view(-1, *[1] * (given["x"].dim() - 2))
    torch.testing.assert_close(case.step(**given, **case.options[0].keywords, h=h), D * given["x"] * gate)


@FIRST
def test_left_to_pytorch(case, device, launches):
    """Derivatives, float64, and a state that lies several times in the same place, which cannot be updated."""
    option = case.options[0]
    given, h = _token(case, option, {}, torch.float32, device)
    leaf = given["x"].clone().requires_grad_()
    y = case.step(**{**given, "x": leaf}, **option.keywords, h=h.clone())
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert gradient.isfinite().all()
    wide = {name: _wide(tensor) for name, tensor in given.items()}
    assert case.step(**wide, **option.keywords, h=_wide(h)).dtype is torch.float64
    with pytest.raises(RuntimeError, match="more than one element"):
        case.step(**given, **option.keywords, h=h[:1].expand(h.shape))
    assert not launches
    with torch.no_grad():
        case.step(**{**given, "x": leaf}, **option.keywords, h=h)
    assert len(launches) == 1


@FIRST
def test_a_saved_state_is_missed(case, device):
    """As after an update by PyTorch: a derivative that needs the state before it must not take the one after it."""
    given, h = _token(case, case.options[0], {}, torch.float32, device)
    weight = torch.ones_like(h).requires_grad_()
    product = (weight * h).sum()
    with torch.no_grad():
        case.step(**given, **case.options[0].keywords, h=h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        case.step(**given, **case.options[0].keywords, h=h.clone())


class _Recorder(TorchDispatchMode):
    """Collects the arguments of the library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "ssmscan":
            self.calls.append((function, arguments))
        return function(*arguments, **(keywords or {}))


@FIRST
def test_registered_operator(case, device):
    given, _, pool, keywords = _form(case, case.options[0], FORMS[0], device)
    recorded = pool.clone()
    y = case.step(**given, **keywords, h=pool)
    with _Recorder() as recorder:
        assert same_bits(case.step(**given, **keywords, h=recorded), y)
    assert same_bits(recorded, pool)
    ((operator, arguments),) = recorder.calls
    torch.library.opcheck(operator, tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments))


@pytest.mark.parametrize(
    "case", [case if case is LINEAR_SCAN else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str
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
    leaves = {name: _wide(tensor).nan_to_num().requires_grad_() for name, tensor in (given | {"h": pool}).items()}
    weights = torch.randn_like(leaves["x"]), torch.randn_like(leaves["h"])

    def gradients(run):
        results = run(leaves["h"].clone(), {name: leaf for name, leaf in leaves.items() if name != "h"})
        total = sum((result * weight).sum().real for result, weight in zip(results, weights, strict=True))
        return torch.autograd.grad(total, leaves.values(), materialize_grads=True)

    def pooled(h, tensors, indices=(3, -1, 0)):
        return case.step(**tensors, **option.keywords, h=h, state_indices=torch.tensor(indices)), h

    def alone(h, tensors):
        own = h[[3, 0]]
        y = case.step(**_each(case, tensors, lambda tensor: tensor[[0, 2]]), **option.keywords, h=own)
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
    token = _each(case, given, lambda tensor: tensor[:, 0])
    buffer = h.new_full((64, *h.shape[1:]), torch.nan)
    pool = buffer[32:35].copy_(h)
    indices = torch.tensor([3, -2, 1], dtype=kind, device=place)
    y = case.step(**token, **case.options[0].keywords, h=pool, state_indices=indices)
    assert not y[:2].any()
    assert y[2].any()
    assert torch.equal(pool[[0, 2]], h[[0, 2]])
    assert not torch.equal(pool[1], h[1])
    pool.fill_(torch.nan)
    assert buffer.isnan().all(), "written outside of the pool"


@FIRST
def test_a_pool_of_no_states(case, place):
    given, h, _, _ = _form(case, case.options[0], (torch.float32, None, None), place)
    token = _each(case, given, lambda tensor: tensor[:, 0])
    nothing = torch.full((3,), -1, device=place)
    assert not case.step(**token, **case.options[0].keywords, h=h[:0], state_indices=nothing).any()


@FIRST
def test_refused_states(case):
    given, h, _, _ = _form(case, case.options[0], (torch.float32, None, None), "cpu")
    token = _each(case, given, lambda tensor: tensor[:, 0])
    rows = torch.arange(3)

    def refuses(error, *parts, **changes):
        with pytest.raises(error) as caught:
            case.step(**token | {"h": h} | changes, **case.options[0].keywords)
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
    refuses(ValueError, "x must have shape (b, ", " or (b, l, ", x=token["x"][None, None])


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


def _far_apart(name, device):
    """Every axis in turn has a stride beyond 2^30 elements; the memory between them is not touched."""
    if device == "cpu":
        _pretend(setattr)
    case = next(case for case in CASES if case.name == name)
    step = 2**30 + 2**16
    buffer = torch.empty(2 * step + 2**16, device=device)
    for option in [option for other, option in OPTIONS if other is case][:2]:
        tokens, h = _tokens(case, option, dict.fromkeys("bldhpngwrc", 3), torch.float32, device)
        for given in (tokens, _each(case, tokens, lambda tensor: tensor[:, 0])):
            expected_h = h.clone()
            expected = case.step(**given, **option.keywords, h=expected_h)
            for axis in range(max(tensor.dim() for tensor in (*given.values(), h))):
                used = 0

                def spread(tensor, axis=axis):
                    nonlocal used
                    place = torch.view_as_complex(buffer.view(-1, 2)) if tensor.is_complex() else buffer
                    along = min(axis, tensor.dim() - 1)
                    strides = [3**i for i in reversed(range(tensor.dim()))]
                    strides[along] = step // (1 + tensor.is_complex())
                    view = place.as_strided(tensor.shape, strides, used)
                    used += 128
                    return view.copy_(tensor)

                far = spread(h)
                y = case.step(**{name: spread(tensor) for name, tensor in given.items()}, **option.keywords, h=far)
                torch.testing.assert_close(y, expected)
                torch.testing.assert_close(far.clone(), expected_h)


@pytest.fixture(scope="module")
def process():
    """Which a wrong address would end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@FIRST
def test_more_than_int32_elements(case, device, process):
    process.submit(_far_apart, case.name, device).result(timeout=300)
