"""ssd's kernels, forward and backward, on sizes so small that the interpreter runs them among the quick tests."""

import pytest
import torch

from ssmscan import backend as available
from ssmscan.ops.ssd.bidirectional.case import CASE as BIDIRECTIONAL
from ssmscan.ops.ssd.bidirectional.case import SHARED
from ssmscan.ops.ssd.case import CASE, LAYER
from ssmscan.testing import Setting, Standard

pytestmark = pytest.mark.skipif(
    available.why_not("triton", "cpu", torch.float32) is not None, reason="Triton's interpreter is not on"
)
SIZE = {"b": 1, "h": 1, "p": 3, "g": 1, "n": 5}


def _judge(call):
    call = call.cast(torch.float32)
    standard = Standard.of(call)
    standard.judge(call.differentiate("triton", standard.cotangents), call.case, torch.float32)


def test_segments(monkeypatch):
    """Three, of a chunk each: every summary is composed, the first one's too."""
    from ssmscan.ops.ssd import configs

    monkeypatch.setattr(configs, "SHORTEST", 1)
    monkeypatch.setattr(configs, "PROGRAMS", 1 << 20)
    _judge(CASE.call(LAYER, {**SIZE, "l": 40}, Setting("h0", h0=True)))


def test_both_directions_in_one_pass():
    """As of whole chunks. Its own token a gradient meets twice, once in each direction."""
    _judge(BIDIRECTIONAL.call(SHARED, {**SIZE, "l": 32}))
