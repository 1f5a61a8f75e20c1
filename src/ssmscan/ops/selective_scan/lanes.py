"""The tiles of the backward: four states of a channel in a lane, S = N / 4 lanes for a channel.

A state is a tile [R, C, S, 4] of R·C channels. What has no states is a tile [R, C, 4] of four steps, each computed by
one lane; where every lane of a channel needs a step, :func:`pick` hands it around. All this stays within a warp: a
tile of as many lanes as a warp has takes this layout from the loads of A and of a step's B and C, in which neighbours
are four states. Offsets whose neighbours lie together would give others, hence ``one`` and :func:`~.tile.vary`; of the
other axes the last lies over the lanes first, hence :func:`~.tile.turned`.
"""

import triton
import triton.language as tl

from ssmscan.ops._triton.activation import softplus
from ssmscan.ops.selective_scan.tile import in_run, turned


@triton.jit
def load_steps(pointer, step, t, low, high, channels, one, inside):
    """Four steps from position t, [R, C, 4] but turned, as they are in memory; 0 outside of the run and ``inside``."""
    row = tl.arange(0, 4)
    exists = in_run(t + row, low, high, True)
    offsets = turned(row.to(tl.int64)[None, None, :] * step + channels[:, :, None] * one)
    mask = turned(exists[None, None, :] & inside[:, :, None])
    return tl.load(pointer + tl.cast(t, tl.int64) * step + offsets, mask=mask, other=0.0)


@triton.jit
def by_channel(tile):
    """What :func:`load_steps` loads as float32 [R, C, 4]."""
    return turned(tile).to(tl.float32)


@triton.jit
def step_sizes(dts, bias, exists, SOFTPLUS: tl.constexpr):
    """The step sizes of four steps, [R, C, 4], before and after softplus; those that do not exist are 0."""
    raw = by_channel(dts) + bias
    return raw, tl.where(exists[None, None, :], softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def store_steps(pointer, step, t, exists, channels, one, inside, tile):
    """Store a [R, C, 4] tile where :func:`load_steps` would load it."""
    row = tl.arange(0, 4).to(tl.int64)
    offsets = turned(row[None, None, :] * step + channels[:, :, None] * one)
    mask = turned(exists[None, None, :] & inside[:, :, None])
    tile = turned(tile).to(pointer.dtype.element_ty)
    tl.store(pointer + tl.cast(t, tl.int64) * step + offsets, tile, mask=mask)


@triton.jit
def pick(tile, i: tl.constexpr, S: tl.constexpr):
    """Step i of a [R, C, 4] tile, for every state: [R, C, S, 1]."""
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    row = tl.gather(tile, tl.full([R, C, 4], i, tl.int32), 2)
    if S > 4:
        row = tl.reshape(tl.broadcast_to(row[:, :, None, :], [R, C, S // 4, 4]), [R, C, S])
    return row[:, :, :, None]


@triton.jit
def load_state_rows(BC, t, low, high, PACKED: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """The rows of B, or C, of four steps from position t, each [1, C, S, 4]; 0 for those that are not in the run."""
    pointers = BC + tl.cast(t, tl.int64) * (2 * N) + tl.broadcast_to(tl.arange(0, N)[None, None, :], [1, C, N])
    rows = ()
    for i in tl.static_range(4):
        if PACKED:
            exists = tl.broadcast_to(in_run(t + i, low, high, True), [1, C, N])
            row = tl.load(pointers + i * 2 * N, mask=exists, other=0.0)
        else:
            row = tl.load(pointers + i * 2 * N)
        rows = rows + (tl.reshape(row, [1, C, N // 4, 4]),)  # type: ignore[assignment]
    return rows


@triton.jit
def load_channels(pointer, channels, inside):
    """Something that each channel [R, C] has, as float32 [R, C, 1]; 0 outside."""
    return tl.load(pointer + channels, mask=inside, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def load_lanes(pointer, channels, inside, channel_step, state_step, n, N: tl.constexpr):
    """Something that each channel [R, C] and state has, as float32 [R, C, S, 4]; 0 outside."""
    states = tl.arange(0, N)[None, None, :]
    offsets = turned(channels[:, :, None] * channel_step + states * state_step)
    tile = turned(tl.load(pointer + offsets, mask=turned(inside[:, :, None] & (states < n)), other=0.0))
    return tl.reshape(tile.to(tl.float32), [channels.shape[0], channels.shape[1], N // 4, 4])


@triton.jit
def store_lanes(pointer, channels, inside, channel_step, state_step, n, N: tl.constexpr, tile):
    """Store where :func:`load_lanes` would load."""
    states = tl.arange(0, N)[None, None, :]
    offsets = turned(channels[:, :, None] * channel_step + states * state_step)
    tile = turned(tl.reshape(tile, [channels.shape[0], channels.shape[1], N]))
    tl.store(pointer + offsets, tile, mask=turned(inside[:, :, None] & (states < n)))


@triton.jit
def _exchange(p, q, M: tl.constexpr):
    """Along the middle axis, p summed with its partner's where bit M of the index is clear, q where it is set."""
    index = tl.arange(0, p.shape[1])
    second = ((index & M) != 0)[None, :, None]
    partner = tl.broadcast_to((index ^ M)[None, :, None], p.shape)
    return tl.where(second, q, p) + tl.gather(tl.where(second, p, q), partner, 1)


@triton.jit
def _fold(tile, M: tl.constexpr, S: tl.constexpr):
    """[rows, lanes, V] summed over lanes that are M apart, M / 2, to S; each time a lane keeps half of V."""
    if M >= S:
        V: tl.constexpr = tile.shape[2]
        p, q = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], tile.shape[1], 2, V // 2]), (0, 1, 3, 2)))
        tile = _fold(_exchange(p, q, M), M // 2, S)
    return tile


@triton.jit
def sum_channels(p, q, CL: tl.constexpr):
    """Sums of two states' tiles over R and over the CL channels of a warp: [C / CL, CL·S, 8 / CL].

    Of p's and q's eight numbers of a lane, lane c of the CL keeps those from c·8 / CL on. Each exchange between lanes
    halves what is left to be summed: 7 exchanges for 8 sums, where sums of one row at a time would take 24.
    """
    C: tl.constexpr = p.shape[1]
    S: tl.constexpr = p.shape[2]
    both = tl.permute(tl.join(tl.sum(p, 0), tl.sum(q, 0)), (0, 1, 3, 2))
    return _fold(tl.reshape(both, [C // CL, CL * S, 8]), CL * S // 2, S)


@triton.jit
def sum_states(r):
    """The [R, C, 4] tile of the sums over S of 4 [R, C, S], one for each step."""
    R: tl.constexpr = r[0].shape[0]
    C: tl.constexpr = r[0].shape[1]
    S: tl.constexpr = r[0].shape[2]
    parts = ()
    for i in tl.static_range(4):
        part = tl.sum(tl.reshape(r[i], [R, C, S // 4, 4]), 2) if S > 4 else r[i]
        parts = parts + (tl.permute(part, (1, 2, 0)),)  # type: ignore[assignment]
    total = _exchange(_exchange(parts[0], parts[2], 2), _exchange(parts[1], parts[3], 2), 1)  # type: ignore[misc]
    return tl.permute(total, (2, 0, 1))
