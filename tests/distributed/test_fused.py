"""Triton's scans of a split sequence against a whole one: ranks are threads here, of which one runs at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch

from ssmscan.backend import why_not
from ssmscan.distributed import scan
from ssmscan.ops.selective_scan.case import CASE as SELECTIVE_SCAN
from ssmscan.ops.ssd.case import CASE as SSD
from ssmscan.testing import Setting, Standard, same_bits

pytestmark = pytest.mark.skipif(
    why_not("triton", "cpu", torch.float32) is not None, reason="Triton interprets only where there is no GPU"
)
SIZES = {SSD: {"b": 2, "h": 4, "p": 3, "g": 2, "n": 5}, SELECTIVE_SCAN: {"b": 2, "d": 6, "n": 3}}


class Meeting:
    """The rows that the ranks have sent, of each exchange."""

    def __init__(self, ranks):
        self.rows = []
        self.turn, self.barrier = threading.Lock(), threading.Barrier(ranks, timeout=60)

    def run(self, work):
        """The results of ``work(rank)`` of all ranks."""

        def alone(rank):
            try:
                with self.turn:
                    return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.barrier.parties) as pool:
            return list(pool.map(alone, range(self.barrier.parties)))


class Seat:
    """A rank's process group."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.met = meeting, rank, 0

    def exchange(self, row):
        meeting, own = self.meeting, self.met
        self.met += 1
        if own == len(meeting.rows):
            meeting.rows.append([None] * meeting.barrier.parties)
        meeting.rows[own][self.rank] = row

        def wait():
            meeting.turn.release()
            try:
                meeting.barrier.wait()
            finally:
                meeting.turn.acquire()
            return torch.stack(meeting.rows[own])

        return wait


def _split(call, lengths, cotangents):
    """y, h and gradients, put together from those of ranks with so many tokens; how many rows went between them."""
    fused = import_module("ssmscan.distributed.fused")
    case, ranks, meeting = call.case, len(lengths), Meeting(len(lengths))
    bounds = [sum(lengths[:rank]) for rank in range(ranks + 1)]
    reverse = call.keywords.get("reverse", False)
    # Some ranks have no use for the last state.
    shares = [0.25, *[None] * (ranks - 2), 0.75]

    def work(rank):
        own = slice(bounds[rank], bounds[rank + 1])
        leaves = {
            name: (tensor[:, own] if name in case.sequence else tensor).detach().requires_grad_()
            for name, tensor in call.tensors.items()
        }
        summarised = scan.SUMMARISED[case.op]
        _, inputs, options = summarised.prepare(**leaves, **call.keywords, backend="triton")
        place = ranks - 1 - rank if reverse else rank
        team = fused.Ranks(Seat(meeting, rank), ranks, place, reverse, place == 0)
        y, h = fused.fused_scan(summarised.operator, inputs, options, team)
        outputs, weights = [y], [cotangents["y"][:, own]]
        if shares[rank] is not None:
            outputs, weights = [y, h], [*weights, shares[rank] * cotangents["h"]]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, materialize_grads=True)
        return y.detach(), h.detach(), dict(zip(leaves, gradients, strict=True))

    ys, hs, gradients = zip(*meeting.run(work), strict=True)
    assert all(same_bits(h, hs[0]) for h in hs)
    values = {"y": torch.cat(ys, 1), "h": hs[0]}
    for name in call.tensors:
        parts = [of_rank[name] for of_rank in gradients]
        values[f"d{name}"] = torch.cat(parts, 1) if name in case.sequence else sum(parts)
    return values, len(meeting.rows)


@pytest.fixture(autouse=True)
def by_threads(monkeypatch):
    monkeypatch.setattr("ssmscan.distributed.fused.exchange", lambda row, group: group.exchange(row))


@pytest.fixture
def segmented(monkeypatch):
    """Each stretch is cut into segments, each batch row of ssd's backward is a part of its own."""
    for module, name, value in (
        ("ssd.configs", "SHORTEST", 1),
        ("ssd.configs", "PROGRAMS", 1 << 20),
        ("ssd.kernel_bwd", "STATES_BYTES", 0),
        ("selective_scan.plan", "SHORTEST_SEGMENT", 8),
        ("selective_scan.kernel_fwd", "SPAN", 16),
        ("selective_scan.kernel_bwd", "SPAN", 16),
    ):
        monkeypatch.setattr(import_module(f"ssmscan.ops.{module}"), name, value)


SETTINGS = (Setting("plain"), Setting("h0_reverse", h0=True, reverse=True))


def _rows(quick):
    """All options in all settings, those slow that are not ``quick``."""
    return [
        pytest.param(
            case, option, setting, marks=() if quick(option, setting) else pytest.mark.slow,
            id=f"{case.name} {option.name} {setting.name}",
        )
        for case in SIZES
        for option in case.options
        for setting in SETTINGS
    ]  # fmt: skip


def _judge(case, option, setting, lengths):
    call = case.call(option, {**SIZES[case], "l": sum(lengths)}, setting).cast(torch.float32)
    standard = Standard.of(call)
    values, rows = _split(call, lengths, standard.cotangents)
    standard.judge(values, case, torch.float32)
    # Once forward, once backward.
    assert rows == 2


@pytest.mark.parametrize(
    ("case", "option", "setting"), _rows(lambda option, setting: "z" not in option.tensors or not setting.h0)
)
def test_stretches_of_one_segment(case, option, setting):
    _judge(case, option, setting, (5, 0, 13))


@pytest.mark.parametrize(
    ("case", "option", "setting"), _rows(lambda option, setting: "z" in option.tensors and setting.h0)
)
def test_stretches_of_several_segments(case, option, setting, segmented):
    _judge(case, option, setting, (0, 50, 34, 1))
