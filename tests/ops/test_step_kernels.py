"""The kernels of the decode steps, which the step functions take on a GPU only: each against its step in float64."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import pytest
import torch
from step_table import ALL, CASES, FIRST, OPTIONS, S4D, SSD, each, narrow, one_token, pretend, some_tokens, wide

from ssmscan.testing import rms_ratio

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
# Errors over the root-mean-square of the oracle.
BOUND = {torch.float32: 4e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def _check(case, option, given, h, launches):
    """One step by the kernel against one in float64; the states at ``h`` are changed."""
    oracle_h = wide(h).clone()
    oracle = case.step(**{name: wide(t) for name, t in given.items()}, **option.keywords, h=oracle_h)
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
        _check(case, option, *one_token(case, option, size, torch.float32, device), launches)
        launches.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_all_in_half_precision(case, option, dtype, device, launches, poisoned):
    """Parameters too, but for complex ones; the state is kept in float32."""
    given, h = one_token(case, option, {}, dtype, device)
    given = {name: tensor if tensor.is_complex() else tensor.to(dtype) for name, tensor in given.items()}
    _check(case, option, given, h, launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_narrow_states(case, option, dtype, device, launches):
    given, h = one_token(case, option, {}, torch.float32, device)
    _check(case, option, given, narrow(h, dtype), launches)


EXTREMES = [(case, option, extreme) for case, option in OPTIONS for extreme in case.extremes]


@pytest.mark.parametrize(("case", "option", "extreme"), EXTREMES, ids=lambda value: getattr(value, "name", value))
def test_extremes(case, option, extreme, device, launches):
    _check(case, option, *one_token(case, option, {}, torch.float32, device, extreme), launches)


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
    given, h = one_token(case, option, {}, torch.float32, device)
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
    _check(S4D, option, *one_token(S4D, option, {"b": 7, "d": 9, "n": 64}, torch.float32, device), launches)


@pytest.mark.parametrize("names", ["ABC", "h", "ABCh"])
def test_lazy_conjugates(names, device, launches):
    """Which PyTorch leaves to whoever reads them, or writes."""
    option = S4D.options[1]
    given, h = one_token(S4D, option, {}, torch.float32, device)
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
    exact = wide(h)
    S4D.step(x=x.double(), dt=step.double(), A=wide(A), B=wide(one), C=wide(one), h=exact)
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
    given, h = one_token(case, case.options[0], {}, torch.float32, device)
    given = {name: tensor if name == "A" else tensor.abs() for name, tensor in given.items()}
    given["x"] = torch.full_like(given["x"], torch.inf)
    assert case.step(**given, **case.options[0].keywords, h=h).isposinf().all()
    assert h.isposinf().all()


@FIRST
def test_nothing(case, device):
    given, h = one_token(case, case.options[0], {"b": 0}, torch.float32, device)
    assert case.step(**given, **case.options[0].keywords, h=h).shape == given["x"].shape


@pytest.mark.parametrize("case", [SSD, S4D], ids=lambda case: case.name)
def test_no_states(case, device, launches):
    given, h = one_token(case, case.options[0], {"n": 0}, torch.float32, device)
    gate = torch.nn.functional.silu(given["z"]) if "z" in given else 1
    D = given["D"].view(-1, *[1] * (given["x"].dim() - 2))
    torch.testing.assert_close(case.step(**given, **case.options[0].keywords, h=h), D * given["x"] * gate)


def _far_apart(name, device):
    """Every axis in turn has a stride beyond 2^30 elements; the memory between them is not touched."""
    if device == "cpu":
        pretend(setattr)
    case = next(case for case in CASES if case.name == name)
    step = 2**30 + 2**16
    buffer = torch.empty(2 * step + 2**16, device=device)
    for option in [option for other, option in OPTIONS if other is case][:2]:
        tokens, h = some_tokens(case, option, dict.fromkeys("bldhpngwrc", 3), torch.float32, device)
        for given in (tokens, each(case, tokens, lambda tensor: tensor[:, 0])):
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
