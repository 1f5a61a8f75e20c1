"""What the tests and benchmarks share: the description of an operation, one call of it, and the bounds on its error.

An operation is tested and timed the moment its :class:`OpCase` stands in ``ops/<name>/case.py`` and in
``ssmscan.ops.cases``.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

# Axis letter to length, as in {"b": 2, "l": 37, "d": 5}.
Size = Mapping[str, int]
# Draws tensors by name: float64 (or complex128), on the CPU.
Inputs = Callable[[Size, torch.Generator], dict[str, Tensor]]

# What an operation, or one way to call it, may lack.
Feature = Literal[
    "h0",  # takes an initial state
    "reverse",  # runs from the right with reverse=True
    "cu_seqlens",  # takes packed sequences
    "dtype",  # returns y in a dtype that is asked for
    "step",  # has a decode step of the same mathematics
    "split",  # run in pieces, the state carried from one to the next, it gives the same
    "causal",  # y before a token does not change by one bit with that token
    "linear",  # y and the final state are jointly linear in OpCase.linear and h0
    "nan",  # a NaN stays in its own sequence, its own channel, and (when causal) its future
]

# So few elements do not even out the chance of one sum.
FEW = 8
# Incoming gradients over which the typical size of such a sum is taken.
DRAWS = 8
# Largest root-mean-square error over the root-mean-square of the float64 oracle.
RMS_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


# Options and cases compare by identity: they hold functions, and serve as keys of caches.
@dataclass(frozen=True, eq=False, repr=False)
class Option:
    """One way to call an operation: which tensors are given, and with which further keywords."""

    name: str
    tensors: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    # Tensors that replace those of the case, as for other shapes or a complex argument.
    inputs: Inputs | None = None
    lacks: tuple[Feature, ...] = ()
    # Where it runs, when not on all backends of the operation.
    backends: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"Option({self.name!r})"


@dataclass(frozen=True)
class Setting:
    """How a sequence is run: from a given initial state, from the right, packed from sequences of these lengths."""

    name: str
    h0: bool = False
    reverse: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[Feature, ...]:
        asked: dict[Feature, bool] = {"h0": self.h0, "reverse": self.reverse, "cu_seqlens": self.lengths is not None}
        return tuple(feature for feature, wanted in asked.items() if wanted)


PLAIN = Setting("plain")


@dataclass(frozen=True)
class Benchmark:
    """One row of an operation's benchmark table."""

    variant: str
    size: Size
    option: Option
    dtype: torch.dtype = torch.bfloat16
    graph: bool = False  # time the replay of a CUDA graph: for shapes whose launches cost more than their work
    device: Literal["cuda", "cpu"] = "cuda"  # where the row is run


@dataclass(frozen=True)
class Refusal:
    """A bad call: ``change`` spoils the keywords of a good one, and ``error`` must follow, naming ``argument``."""

    name: str
    change: Callable[[dict[str, Any]], None]
    error: type[Exception]
    argument: str


@dataclass(frozen=True, eq=False, repr=False)
class OpCase:
    """All that the conformance suite and the benchmarks need to know of one operation."""

    name: str
    op: Callable[..., Any]
    # Every tensor argument but the state, optional ones included.
    inputs: Inputs
    # The first gives the most tensors: tests that need one way to call the operation take that.
    options: tuple[Option, ...]
    # In the first, every axis is longer than 1 and the length is no multiple of 16.
    sizes: tuple[Size, ...]
    # Arguments (b, l, ...); the others (A, D, weights) have neither axis and hold for all time.
    sequence: tuple[str, ...]
    # Those of them whose further axes are the first ones of y's: an element reaches y only at its own indices there.
    channelwise: tuple[str, ...] = ("x",)
    # x may have any leading axes, not only (b, l).
    leading: bool = False
    # Arguments that stay float32 when the others are bfloat16 or float16.
    wide: tuple[str, ...] = ()
    # The state's shape after its first axis; None when the operation returns y alone.
    state: Callable[[Size], tuple[int, ...]] | None = None
    # The decode step, called with the names and keywords of the operation, without the length, and with the state h.
    step: Callable[..., Tensor] | None = None
    # Arguments in which y and the final state are jointly linear; h0 belongs to them by itself.
    linear: tuple[str, ...] = ("x",)
    # Beyond what follows from the operation's signature and the fields above.
    lacks: tuple[Feature, ...] = ()
    # Sums are of products rounded to the inputs' dtype, as on tensor cores: float32 results are no better than that.
    rounds: bool = False
    backends: tuple[str, ...] = ("torch", "cpu", "triton")
    # A call takes long, in Triton's interpreter above all: fewer of the suite's rows are quick.
    heavy: bool = False
    # Inputs at the edges of the domain (a = 0, huge dt, ...), by name: they replace those of ``inputs``.
    extremes: Mapping[str, Inputs] = field(default_factory=dict)
    # What this operation alone refuses; wrong types, shapes, devices and backends are tried for every operation.
    refused: tuple[Refusal, ...] = ()
    # Sizes for a GPU; in the first, again, every axis is longer than 1.
    large: tuple[Size, ...] = ()
    # The most memory that a forward and backward may take on a GPU, over that of the outputs and gradients.
    peak_memory: float = 1.1
    benchmarks: tuple[Benchmark, ...] = ()
    # The tiny call whose host time is recorded; None takes the first benchmark's, small.
    host: Benchmark | None = None
    # Least time in ms on an H200 by arithmetic, of "fwd" or "fwdbwd" at a size, where that can exceed the bytes'.
    floor_ms: Callable[[Size, str], float] | None = None

    def __repr__(self) -> str:
        return f"OpCase({self.name!r})"

    def has(self, option: Option, *features: Feature) -> bool:
        """Whether the operation, called as ``option``, has all of ``features``."""
        parameters = inspect.signature(self.op).parameters
        arguments: tuple[Feature, ...] = ("h0", "reverse", "cu_seqlens", "dtype")
        present: dict[Feature, bool] = {argument: argument in parameters for argument in arguments}
        present["step"] = self.step is not None
        present["split"] = "h0" in parameters
        present["linear"] = bool(set(self.linear) & set(option.tensors))
        return all(present.get(f, True) and f not in self.lacks and f not in option.lacks for f in features)

    def draw(self, size: Size, option: Option, seed: int = 0, extreme: str | None = None) -> dict[str, Tensor]:
        """The tensors of ``option`` in float64, without ``h0``."""
        generator = torch.Generator().manual_seed(seed)
        tensors = self.inputs(size, generator)
        if option.inputs is not None:
            tensors |= option.inputs(size, generator)
        if extreme is not None:
            tensors |= self.extremes[extreme](size, generator)
        return {name: tensors[name] for name in option.tensors}

    def draw_state(self, size: Size, count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        """An initial state for ``count`` sequences, float64 or complex128."""
        assert self.state is not None, f"{self.name} has no state"
        return torch.randn(count, *self.state(size), generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def call(
        self, option: Option, size: Size, setting: Setting = PLAIN, seed: int = 0, extreme: str | None = None
    ) -> "Call":
        """The whole call in float64; a packed ``setting`` overrides the size's batch and length."""
        keywords = dict(option.keywords)
        if setting.lengths is not None:
            size = {**size, "b": 1, "l": sum(setting.lengths)}
            keywords["cu_seqlens"] = torch.tensor([0, *accumulate(setting.lengths)])
        if setting.reverse:
            keywords["reverse"] = True
        tensors = self.draw(size, option, seed, extreme)
        if setting.h0:
            count = size["b"] if setting.lengths is None else len(setting.lengths)
            tensors["h0"] = self.draw_state(size, count, seed + 1, _widest(tensors.values()))
        return Call(self, tensors, keywords)

    def cast(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """``tensors`` as a user would pass them at ``dtype``; states and ``wide`` ones no narrower than float32."""
        wide = torch.promote_types(dtype, torch.float32)

        def target(name: str, tensor: Tensor) -> torch.dtype:
            if tensor.is_complex():
                return wide.to_complex()
            return wide if name in self.wide or name == "h0" else dtype

        return {name: tensor.to(device, target(name, tensor)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Call:
    """One call of an operation: its tensors and keywords, to be changed, run and differentiated."""

    case: OpCase
    tensors: Mapping[str, Tensor]
    keywords: Mapping[str, Any]

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> "Call":
        return Call(self.case, self.case.cast(self.tensors, dtype, device), _moved(self.keywords, device))

    def to(self, device: str) -> "Call":
        return Call(self.case, _moved(self.tensors, device), _moved(self.keywords, device))

    def replace(self, **tensors: Tensor) -> "Call":
        return replace(self, tensors={**self.tensors, **tensors})

    def set(self, **keywords: Any) -> "Call":
        """With these keywords; None takes one away."""
        merged = {**self.keywords, **keywords}
        return replace(self, keywords={name: value for name, value in merged.items() if value is not None})

    def each(self, function: Callable[[Tensor], Tensor], names: tuple[str, ...] | None = None) -> "Call":
        """With ``function`` applied to the arguments (b, l, ...), or to those of ``names`` that are given."""
        chosen = self.case.sequence if names is None else names
        return self.replace(**{name: function(t) for name, t in self.tensors.items() if name in chosen})

    def run(self, backend: str) -> dict[str, Tensor]:
        """The outputs: y and, of an operation with a state, h."""
        result = self.case.op(**self.tensors, **self.keywords, backend=backend)
        return {"y": result} if isinstance(result, Tensor) else dict(zip(("y", "h"), result, strict=True))

    def differentiate(
        self, backend: str, cotangents: Mapping[str, Tensor] | None = None, wrt: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """:func:`differentiate` of one run."""
        return differentiate(lambda call: call.run(backend), self, cotangents, wrt)


def differentiate(
    run: Callable[[Call], Mapping[str, Tensor]],
    call: Call,
    cotangents: Mapping[str, Tensor] | None = None,
    wrt: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """The outputs of ``run`` and, as dx, dh0, ..., its gradients in all arguments of ``call``, or in ``wrt``.

    Without ``cotangents``, those of :func:`draw_cotangents`. An output given none has an undefined gradient.
    """
    names = tuple(call.tensors) if wrt is None else wrt
    leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in call.tensors.items()}
    outputs = run(replace(call, tensors=leaves))
    cotangents = draw_cotangents(outputs) if cotangents is None else cotangents
    chosen = {name: output for name, output in outputs.items() if name in cotangents and output.requires_grad}
    gradients = torch.autograd.grad(
        list(chosen.values()),
        [leaves[name] for name in names],
        [cotangents[name] for name in chosen],
        materialize_grads=True,
    )
    return {name: output.detach() for name, output in outputs.items()} | {
        f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def draw_cotangents(outputs: Mapping[str, Tensor], seed: int = 2) -> dict[str, Tensor]:
    """Random gradients of ``outputs``, in their dtypes and on their device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            output.shape, generator=generator, dtype=torch.complex128 if output.is_complex() else torch.float64
        ).to(output)
        for name, output in outputs.items()
    }


def widest(backend: str) -> torch.dtype:
    """The widest dtype that ``backend`` runs, for properties that hold up to rounding."""
    return torch.float32 if backend == "triton" else torch.float64


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def rms(tensor: Tensor) -> float:
    """The root-mean-square of ``tensor``, in float64; of no elements, 0."""
    return _widen(tensor).abs().square().mean().sqrt().item() if tensor.numel() else 0.0


def rms_ratio(value: Tensor, oracle: Tensor, size: float | None = None) -> float:
    """Root-mean-square of the error over ``size``, or the oracle's; not finite unless all of ``value`` is."""
    assert value.shape == oracle.shape, f"{tuple(value.shape)} against the oracle's {tuple(oracle.shape)}"
    error = rms(_widen(value) - _widen(oracle))
    return error / max(rms(oracle) if size is None else size, torch.finfo(torch.float64).tiny)


def assert_close(values: Mapping[str, Tensor], oracles: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The same tensors up to the rounding of ``dtype``."""
    assert set(values) == set(oracles), f"{sorted(values)} against {sorted(oracles)}"
    ratios = {name: rms_ratio(values[name], oracles[name]) for name in oracles}
    wrong = {name: f"{ratio:.1e}" for name, ratio in ratios.items() if not ratio <= RMS_BOUND[dtype]}
    assert not wrong, f"relative errors {wrong} above {RMS_BOUND[dtype]:.0e}"


def assert_same_bits(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert set(values) == set(others), f"{sorted(values)} against {sorted(others)}"
    wrong = [name for name in values if not same_bits(values[name], others[name])]
    assert not wrong, f"{wrong} differ"


def same_bits(value: Tensor, other: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return (
        value.dtype is other.dtype
        and torch.equal(value.isnan(), other.isnan())
        and torch.equal(value.nan_to_num(), other.nan_to_num())
    )


@dataclass(frozen=True)
class Standard:
    """What a call is judged by: the oracle's results and a run of the reference in the call's own dtype."""

    cotangents: Mapping[str, Tensor]
    oracle: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    sums: Mapping[str, float]

    @classmethod
    def of(cls, call: Call, device: str = "cpu") -> "Standard":
        """The oracle reads the same rounded inputs and incoming gradients as ``call``, in float64.

        The call is on the CPU, where float64 and loops over tokens are quicker than on a GPU. Its reference runs on
        ``device``: whose exponentials are what another backend there can be held to.
        """
        cotangents = draw_cotangents(call.run("reference"))
        # In float64 y too, whatever the call asks for.
        wide = call.cast(torch.float64).set(dtype=None)
        oracle = wide.differentiate("reference", {name: _widen(tensor) for name, tensor in cotangents.items()})
        there = _moved(cotangents, device)
        return cls(there, _moved(oracle, device), call.to(device).differentiate("reference", there), _sums(wide))

    def judge(self, values: Mapping[str, Tensor], case: OpCase, dtype: torch.dtype) -> None:
        """Each of ``values`` is within its bounds, where the oracle is finite."""
        assert set(values) == set(self.oracle), f"{sorted(values)} against {sorted(self.oracle)}"
        failures = []
        for name, oracle in self.oracle.items():
            assert values[name].dtype is self.reference[name].dtype, f"{name} is {values[name].dtype}"
            bound = RMS_BOUND[dtype if case.rounds else _real(values[name].dtype)]
            # The reference rounds no products, so it does not tell what to expect of these.
            rounded = case.rounds and dtype is not torch.float64 and values[name].dtype.itemsize > 2
            finite = oracle.isfinite()
            value, reference, truth = (v[finite] for v in (values[name], self.reference[name], oracle))
            size = self.sums.get(name, rms(truth))
            failures += [
                f"{name}: {failure}"
                for failure in _failures(value, reference, truth, size, bound, dtype if rounded else None)
            ]
        assert not failures, "; ".join(failures)


def _sums(call: Call) -> dict[str, float]:
    """The typical size of each gradient that is a sum over the tokens and has few elements.

    The terms of one such sum may cancel, up to any loss of digits. Its size is that over several incoming gradients.
    """
    few = tuple(
        name
        for name, tensor in call.tensors.items()
        if name not in (*call.case.sequence, "h0") and 0 < tensor.numel() <= FEW
    )
    if not few:
        return {}
    leaves = {name: tensor.detach().requires_grad_(name in few) for name, tensor in call.tensors.items()}
    outputs = {name: output for name, output in call.replace(**leaves).run("reference").items() if output.requires_grad}
    draws = [draw_cotangents(outputs, seed) for seed in range(3, 3 + DRAWS)]
    gradients = torch.autograd.grad(
        list(outputs.values()),
        [leaves[name] for name in few],
        [torch.stack([draw[name] for draw in draws]) for name in outputs],
        is_grads_batched=True,
        materialize_grads=True,
    )
    return {f"d{name}": rms(gradient) for name, gradient in zip(few, gradients, strict=True)}


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real()


def _failures(
    value: Tensor,
    reference: Tensor,
    oracle: Tensor,
    size: float,
    bound: float,
    rounded: torch.dtype | None,
) -> list[str]:
    """Errors over ``size``: root-mean-square within ``bound``; it and the largest near twice the reference's.

    An element far larger than most may be off by ``bound`` of its own size too.
    ``rounded``: to what the products in ``value`` were, not so in ``reference``. The bound alone is for the
    root-mean-square then. Tensor cores cut off sums that float32 rounds: four times for the largest error.
    """
    unit = torch.finfo(rounded or value.dtype).eps
    error, floor = rms_ratio(value, oracle, size), rms_ratio(reference, oracle, size)
    # Few errors do not even out either.
    allowed = bound if rounded else min(bound, 2 * floor + bound / (8 if oracle.numel() > FEW else 2))
    failures = []
    if not error <= allowed:
        failures.append(f"error {error:.1e} above {allowed:.1e} (the reference's is {floor:.1e})")
    if oracle.numel():
        value, reference, oracle = _widen(value), _widen(reference), _widen(oracle)
        errors, floor = (value - oracle).abs(), (reference - oracle).abs().max().item()
        largest = (errors - bound * oracle.abs()).max().item()
        # The reference may be lucky where the oracle is largest: rounding there is off by up to half a unit.
        floor = max(floor, unit / 2 * oracle.abs().max().item())
        allowed = (4 if rounded else 2) * floor + bound * size
        if not largest <= allowed:
            rule = f"above {allowed:.1e} and {bound:.0e} of its element (the reference's is {floor:.1e})"
            failures.append(f"largest error {errors.max().item():.1e} {rule}")
    return failures


def _moved(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return torch.complex128 if any(tensor.is_complex() for tensor in tensors) else torch.float64
