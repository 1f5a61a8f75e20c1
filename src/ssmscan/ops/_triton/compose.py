"""What stretches of a sequence, scanned one after the other, make of a state, for operations that hand states on.

A stretch does h -> decay·h + total. Stretches are the segments of one launch, or what each of several processes
has. Whoever composes the same of them gets the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.activation import LOG2E, exp2
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.window import from_first

BLOCK = 256
# Stretches whose summaries are on their way.
STAGES = 4


class Stretches(NamedTuple):
    """What each does to a state, (b, k, ...), whose k channels have one decay each, or by the ``rates`` several."""

    logs: Tensor  # (stretches, b, k): of the decay to the base 2, or of a rate of 1 to the base e
    totals: Tensor  # (stretches, b, k, ...)
    rates: Tensor | None = None  # (k, n)


# From the segments of a rank's stretch, to what waits for the state that enters it from the other ranks' stretches.
Enter = Callable[[Stretches], Callable[[], Tensor | None]]


@kernel(do_not_specialize=["count", "place", "starts"])
def compose_stretches(
    # read
    logs, totals, rates, initial,
    # written
    log, before, after,
    # sizes
    channels, inner, blocks, count, place, starts,
    # strides
    logs_step, logs_batch, totals_step, totals_batch, totals_channel, totals_state, rates_channel, rates_state,
    initial_step, initial_batch, initial_channel, initial_state,
    # constants
    ACROSS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the sum of the initial states, the states ``before`` the stretch at a place and ``after`` all of them.

    ACROSS: channels lie side by side in the totals, not a channel's states.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = at < channels * inner
    channel = at % channels if ACROSS else at // inner
    state = at // channels if ACROSS else at % inner
    h = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        initial += batch * initial_batch + channel * initial_channel + state * initial_state
        for i in range(starts):
            h += tl.load(initial + tl.cast(i, tl.int64) * initial_step, mask=exists, other=0.0).to(tl.float32)
    rate = tl.full((BLOCK,), 1.0, tl.float32)
    if rates is not None:
        rate = tl.load(rates + channel * rates_channel + state * rates_state, mask=exists, other=0.0)
        rate = rate.to(tl.float32) * LOG2E
    logs += batch * logs_batch + channel
    totals += batch * totals_batch + channel * totals_channel + state * totals_state
    passed = tl.zeros((BLOCK,), tl.float32)
    kept = h
    for j in tl.range(0, count, num_stages=STAGES):
        own = tl.load(logs + tl.cast(j, tl.int64) * logs_step, mask=exists, other=0.0)
        total = tl.load(totals + tl.cast(j, tl.int64) * totals_step, mask=exists, other=0.0)
        kept = tl.where(j == place, h, kept)
        # A state of zero stays zero, though the decay of a system that grows overflows.
        h = tl.where(h == 0.0, 0.0, h * exp2(own * rate)) + total
        passed += own
    out = (batch * channels + channel) * inner + state
    tl.store(after + out, h, mask=exists)
    if before is not None:
        tl.store(before + out, kept, mask=exists)
    if log is not None:
        tl.store(log + batch * channels + channel, passed, mask=exists & (state == 0))


def compose(
    stretches: Stretches,
    initial: Tensor | None,
    after: Tensor,
    count: int,
    *,
    backward: bool = False,
    log: Tensor | None = None,
    before: Tensor | None = None,
    place: int = 0,
) -> None:
    """Write the state ``after`` the first ``count`` stretches, (b, k, ...), and ``before`` the one at a ``place``.

    ``initial`` states, (starts, b, k, ...), are added up; ``log`` is that of these stretches together, (b, k). The
    first stretch is the last one given if it goes ``backward``.
    """
    logs, totals, rates = stretches
    totals, initial = totals.flatten(3), None if initial is None else initial.flatten(3)
    batch, channels, inner = totals.shape[1:]
    blocks = -(-channels * inner // BLOCK)
    sign = -1 if backward else 1
    compose_stretches.launch(
        (batch * blocks, 1, 1),
        (from_first(logs, 0, backward), from_first(totals, 0, backward), rates, initial, log, before, after),
        (
            channels, inner, blocks, count, place, 0 if initial is None else initial.shape[0],
            sign * logs.stride(0), logs.stride(1), sign * totals.stride(0), *totals.stride()[1:],
            *((0, 0) if rates is None else rates.stride()), *((0,) * 4 if initial is None else initial.stride()),
        ),
        (totals.stride(2) == 1 and inner > 1, BLOCK, STAGES),
        4,
    )  # fmt: skip
