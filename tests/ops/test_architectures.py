"""Each launch configuration compiled for GPUs that are not here, whose shared memory it must fit."""

import pytest

from ssmscan.ops.cases import CASES
from ssmscan.testing import PLAIN, Setting

pytest.importorskip("triton")


# Of each operation what picks each of its configurations, with tiles of which nothing is masked and with others.
SIZES = {
    "causal_conv1d": [{"d": 256, "w": 4}, {"d": 33, "w": 4}, {"d": 256, "w": 8}],
    "gated_rms_norm": [{"d": 768}, {"d": 33}, {"d": 12288}],
    "linear_scan": [{"d": 256}, {"d": 33}, {"b": 8, "l": 64, "d": 8192}],
    "matrix_scan": [{"r": 2, "c": 64}, {"r": 2, "c": 33}, {"r": 2, "c": 20}],
    "rg_lru": [{"d": 256}, {"d": 33}],
    "s4d": [{"d": 4, "n": n} for n in (64, 32, 16, 5)],
    "selective_scan": [{"d": 64, "n": n} for n in (16, 64, 128, 256, 5)],
    "ssd": [{"h": 2, "p": 64, "g": 1, "n": n} for n in (16, 64, 128, 256)]
    + [{"h": 2, "p": 128, "g": 1, "n": 128}, {"h": 2, "p": 40, "g": 2, "n": 100}],
    "ssd_bidirectional": [{"h": 2, "p": 64, "g": 1, "n": n} for n in (64, 128, 256)]
    + [{"h": 2, "p": 40, "g": 2, "n": 100}],
}
PACKED = Setting("packed", h0=True, reverse=True, lengths=(0, 1, 15, 16, 17, 0, 207))
NAMES = {case.name: case for case in CASES}


def _calls(case, dtype, size):
    size = {**case.large[0], "b": 1, "l": 256, **size}
    for option in case.options:
        if "triton" not in (option.backends or case.backends):
            continue
        for setting in (PLAIN, PACKED):
            if case.has(option, *setting.needs):
                yield case.call(option, size, setting).cast(dtype)


def kernels(name, dtype, size, architecture):
    """What the operation launches there, each once: forward, backward and step."""
    from ssmscan.bench.kernels import forward_and_backward, launches

    case = NAMES[name]
    found = []
    for call in _calls(case, dtype, size):
        found += launches(architecture, forward_and_backward(call))
        if case.step is not None and "cu_seqlens" not in call.keywords:
            pass
    return list(dict.fromkeys(found))
