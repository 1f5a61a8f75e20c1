"""The launch configurations, compiled for GPUs that are not here, whose shared memory they must fit."""

from importlib.util import find_spec

import pytest
import torch

from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, Setting

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton to compile with")

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Of each operation what picks each of its configurations, with tiles of which nothing is masked; and of the first of
# them, too, packed sequences.
SIZES = {
    "causal_conv1d": [{"d": 256, "w": 4}, {"d": 256, "w": 8}],
    "gated_rms_norm": [{"d": 768}, {"d": 4096}, {"d": 12288}],
    "linear_scan": [{"d": 256}, {"b": 8, "l": 16, "d": 8192}],
    "matrix_scan": [{"r": 2, "c": 64}, {"r": 2, "c": 32}],
    "rg_lru": [{"d": 256}],
    "s4d": [{"d": 4, "n": n} for n in (128, 32, 16)],
    "selective_scan": [{"d": 64, "n": n} for n in (16, 64, 128, 256)],
    "ssd": [{"h": 2, "p": p, "g": 1, "n": n} for n, p in ((128, 64), (16, 16), (64, 64), (256, 64), (128, 128))],
    "ssd_bidirectional": [{"h": 2, "p": 64, "g": 1, "n": n} for n in (128, 64, 256)],
}
# Ways to call an operation that have configurations of their own, beside the first.
OPTIONS = {"linear_scan": ("a", "log_a, b"), "s4d": ("complex, no D",), "ssd_bidirectional": ("plain",)}
PACKED = Setting("packed", h0=True, reverse=True, lengths=(0, 1, 15, 16, 17, 0, 207))
NAMES = {case.name: case for case in CASES}


def _kernels(name, dtype, size, architecture, packed):
    """What the operation launches there, each once: forward, backward and step."""
    from ssmscan.bench.kernels import forward_and_backward, launches, step

    case = NAMES[name]
    size = {**case.large[0], "b": 1, "l": 256, **size}
    found = []
    for option in case.options:
        if option is not case.options[0] and option.name not in OPTIONS.get(name, ()):
            continue
        for setting in (PLAIN, PACKED) if packed and case.has(option, *PACKED.needs) else (PLAIN,):
            call = case.call(option, size, setting).cast(dtype)
            found += launches(architecture, forward_and_backward(call))
            if setting is PLAIN and case.has(option, "step"):
                complex_state = any(tensor.is_complex() for tensor in call.tensors.values())
                h = case.draw_state(size, size["b"], dtype=torch.complex64 if complex_state else torch.float32)
                found += launches(architecture, step(call, h))
    return list(dict.fromkeys(found))


def _excess(name, dtype, size, architecture, packed=True, like=""):
    """The kernels with such a name that take too much, and how many there are; for a process that compiles."""
    from ssmscan.ops._triton.device import ARCHITECTURES

    launched = [kernel for kernel in _kernels(name, dtype, size, architecture, packed) if like in kernel.name]
    compiled = [kernel.compiled(architecture) for kernel in launched]
    limit = ARCHITECTURES[architecture].shared
    return [(c.launched.name, c.launched.arguments, c.shared) for c in compiled if c.shared > limit], len(compiled)


@pytest.mark.parametrize(
    ("name", "dtype", "n", "like", "architecture", "count"),
    [
        ("ssd", torch.bfloat16, 128, "_gradients", 86, 3),
        ("ssd", torch.bfloat16, 256, "_gradients", 89, 3),
        ("ssd", torch.float32, 128, "_gradients", 80, 3),
        ("ssd", torch.float32, 256, "state_gradients", 120, 1),
        ("ssd_bidirectional", torch.bfloat16, 128, "pair_gradients", 86, 3),
        ("s4d", torch.float32, 64, "walk", 80, 8),
        ("s4d", torch.bfloat16, 64, "walk", 120, 8),
    ],
)
def test_largest(name, dtype, n, like, architecture, count, compiler):
    """Those that once took more than the GPU has."""
    size = {"d": 4} if name == "s4d" else {"h": 2, "p": 64, "g": 1}
    assert compiler(_excess, name, dtype, {**size, "n": n}, architecture, False, like) == ([], count)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "size"), [(name, size) for name in SIZES for size in SIZES[name]], ids=str)
def test_all(name, size, dtype, architecture, compiler):
    excess, count = compiler(_excess, name, dtype, size, architecture, size is SIZES[name][0])
    assert (excess, count > 1) == ([], True)


@pytest.mark.parametrize(
    ("n", "backward", "architecture", "error", "message"),
    [
        (512, True, 86, RuntimeError, "need a GPU with 180224 bytes of shared memory for a block, got 101376"),
        (1000, False, 90, NotImplementedError, "B must have at most 512 states n of torch.bfloat16 on a GPU, got 1000"),
    ],
)
def test_more_states_than_fit(n, backward, architecture, error, message, monkeypatch):
    from ssmscan.ops._triton import device
    from ssmscan.ops.ssd.configs import tiles_for

    monkeypatch.setattr(device, "shared_memory", lambda _: device.ARCHITECTURES[architecture].shared)
    with pytest.raises(error, match=f'^ssd: .*{message}. Use backend="torch".'):
        tiles_for(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16), n, backward)
