"""The backward of ssd on Triton: two walks, which keep the states before chunks, then the gradients of each chunk."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ssmscan.ops._triton.compose import Enter
from ssmscan.ops._triton.gradients import room, rows, state_room, sum_rows
from ssmscan.ops._triton.launch import kernel
from ssmscan.ops._triton.walk import channels_last
from ssmscan.ops.ssd.autograd import Inputs, Options
from ssmscan.ops.ssd.configs import gradient_tiles, split_heads, tiles_for
from ssmscan.ops.ssd.kernel_fwd import float32, table
from ssmscan.ops.ssd.kernel_grad import chunks_of
from ssmscan.ops.ssd.kernel_pair_grad import pair_gradients
from ssmscan.ops.ssd.kernel_state_grad import state_gradients
from ssmscan.ops.ssd.kernel_walk import Summaries, summarise, walk
from ssmscan.ops.ssd.step_sizes import step_gradients, steps

# The states between chunks of as many batch rows are kept at once, for each scan.
STATES_BYTES = 1 << 29
GATE_BLOCK = 1024


@kernel(do_not_specialize=["size"])
def ssd_gate(dy, y, z, dz, gated, size, BLOCK: tl.constexpr):
    """The gradients of y·silu(z) by z and by y."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    dys = tl.load(dy + i, mask=mask, other=0.0).to(tl.float32)
    ys = tl.load(y + i, mask=mask, other=0.0).to(tl.float32)
    zs = tl.load(z + i, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-zs))
    tl.store(dz + i, (dys * ys * sigmoid * (1.0 + zs * (1.0 - sigmoid))).to(dz.dtype.element_ty), mask=mask)
    tl.store(gated + i, (dys * zs * sigmoid).to(gated.dtype.element_ty), mask=mask)


def backward(
    inputs: Inputs,
    dy: Tensor,
    dh: Tensor | None,
    options: Options,
    needs: Sequence[bool],
    *,
    enter: Enter | None = None,
) -> Sequence[Tensor | None]:
    """The gradients. Of a stretch of a longer sequence ``enter`` makes dh, from what the stretch does to it."""
    x, z, h0 = inputs.x, inputs.z, inputs.h0
    dx, dz = x.new_empty(x.shape), None if z is None else z.new_empty(z.shape)
    dh0 = state_room(h0, dh, needs[8], passes=inputs.sequence is not None or x.shape[1] == 0)
    (ddt,), (dA, dB, dC, dD, dbias) = scan_gradients(
        inputs, [(inputs.dt, options.reverse)], dy, dh, options[:3], dx, dz, dh0, enter=enter
    )
    return [dx, ddt, dA, dB, dC, dD, dz, dbias, dh0]


def scan_gradients(
    inputs: Inputs,
    scans: list[tuple[Tensor, bool]],
    dy: Tensor,
    dh: Tensor | None,
    options: tuple[bool, float, float],
    dx: Tensor,
    dz: Tensor | None = None,
    dh0: Tensor | None = None,
    *,
    shift: bool = False,
    added: Tensor | None = None,
    enter: Enter | None = None,
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """The gradients of each dt, and of A, B, C, D and dt_bias; ``dx``, plus ``added``, ``dz`` and ``dh0`` are written.

    Of the ``scans`` their dt is given and whether they go from the end: one, or, where they are :func:`joint`, both.
    The gradient of the final state comes from ``enter`` where one scan has that; what makes it runs beside a walk.
    """
    x, _, A, B, C, D, z, dt_bias, h0, sequence = inputs
    batch, l, heads, p = x.shape
    groups, n = B.shape[2:]
    ddts = [dt.new_empty(dt.shape) for dt, _ in scans]
    dA, dB, dC, dD, dbias = gradients = room((A, B, C, D, dt_bias), (True,) * 5)
    if x.numel() == 0:
        return [ddt.zero_() for ddt in ddts], tuple(t if t is None else t.zero_() for t in gradients)
    tiles = tiles_for(x, n, backward=True)
    wide = gradient_tiles(tiles, p)
    tables = [None if h0 is None else table(sequence, h0, tiles, reverse) for _, reverse in scans]
    chunks = -(-l // tiles.Q) if tables[0] is None else tables[0].shape[1]
    of_heads, splits = split_heads(batch * chunks * groups, heads // groups)
    # Each chunk gives a part of the gradients of A, dt_bias and D, each split of the heads one of those of B and C.
    by_channel = dD is not None and dD.dim() == 2
    of_head = x.new_empty(len(scans), batch, chunks, 3 * heads, dtype=torch.float32)
    of_channel = x.new_empty(batch, chunks, heads, p, dtype=torch.float32) if by_channel else None
    of_group = x.new_empty(splits, 2, batch, l, groups, n, dtype=torch.float32)
    rate, bias = float32(A), float32(dt_bias)
    xs, Bs, Cs, dys = (channels_last(v) for v in (x, B, C, dy))
    at_once = max(min(STATES_BYTES // (2 * chunks * heads * p * n * tiles.dtype.itemsize), batch), 1)
    states, adjoints = x.new_empty(2, len(scans), at_once, chunks, heads, p, n, dtype=tiles.dtype)
    whole = summaries = pending = None
    if enter is not None:
        whole = steps(scans, rate, bias, tables, tiles, options)
        summaries = summarise(dys, Cs, whole, tiles, scans[0][1], adjoint=True, z=channels_last(z))
        pending = enter(summaries.stretches())
    for begin in range(0, batch, at_once):
        part = slice(begin, begin + at_once) if at_once < batch else None
        x_, B_, C_, dy_, dx_, z_, dz_, added_, of_channel_ = rows(part, xs, Bs, Cs, dys, dx, z, dz, added, of_channel)
        # Packed sequences have one batch row, and many states.
        of_state = part if sequence is None else None
        h, first = rows(of_state, h0, dh0)
        dts = [(dt if part is None else dt[part], reverse) for dt, reverse in scans]
        sizes = whole if whole is not None and part is None else steps(dts, rate, bias, tables, tiles, options)
        y = None if z is None else x.new_empty(x_.shape, dtype=tiles.dtype)
        for scan, (_, reverse) in enumerate(scans):
            given = (tables[scan], tiles, reverse)
            walk(x_, B_, sizes, h, *given, scan=scan, c=C_, D=D, y=y, states=states[scan])
            if z_ is not None and y is not None and dz_ is not None:
                dy_ = gate(dy_, y, z_, dz_)
            if pending is not None:
                dh, pending = pending(), None
            (last,) = rows(of_state, dh)
            own_ = None if summaries is None else Summaries(*rows(part, *summaries))
            walk(
                dy_, C_, sizes, last, *given, summaries=own_, scan=scan, adjoint=True, shift=shift,
                states=adjoints[scan], final=first,
            )  # fmt: skip
        # The tensors are read in the direction of the first scan.
        shared = chunks_of(
            x_, dy_, B_, C_, dx_, of_group if part is None else of_group[:, :, part], tables[0], sizes, wide,
            scans[0][1], of_heads, shift,
        )  # fmt: skip
        partial = dx_ if dx.dtype is tiles.dtype else x.new_empty(x_.shape, dtype=tiles.dtype)
        of_states = state_gradients(shared, added_, states, adjoints, partial)
        of_pairs = pair_gradients(shared, D, partial, dx_, of_channel_, shift)
        for scan, (dt, reverse) in enumerate(dts):
            own = of_head[scan], ddts[scan]
            parts, ddt = own if part is None else (v[part] for v in own)
            # The first scan alone has D.
            skips = scan == 0 and dD is not None and not by_channel
            step_gradients(
                scan, dt, rate, bias, tables[scan], sizes, of_pairs, of_states, ddt, parts, skips, wide, options,
                reverse,
            )  # fmt: skip
        # Before the next rows have theirs.
        del sizes, shared, of_states, of_pairs, y, partial
    # Not while the sums are made.
    del states, adjoints
    sum_rows(of_head.view(-1, 3 * heads), (heads, heads, heads), (dA, dbias, None if by_channel else dD))
    sum_rows(of_group.view(splits, -1), (B.numel(), C.numel(), 0), (dB, dC, None))
    if of_channel is not None:
        sum_rows(of_channel.view(-1, heads * p), (heads * p, 0, 0), (dD, None, None))
    return ddts, (dA, dB, dC, dD, dbias)


def joint(x: Tensor, B: Tensor, sequence: Tensor | None, shift: bool) -> bool:
    """Whether both directions can share all but the walks: the same chunks, and heads of one block of channels."""
    tiles = tiles_for(x, B.shape[3], backward=True)
    blocks = -(-x.shape[3] // gradient_tiles(tiles, x.shape[3]).BP)
    return sequence is None and not shift and x.shape[1] % tiles.Q == 0 and blocks == 1


def gate(dy: Tensor, y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """Write ``dz``, and return the gradient of y before the gate."""
    gated = torch.empty_like(y)
    size = y.numel()
    ssd_gate.launch(
        (-(-size // GATE_BLOCK), 1, 1), (dy.contiguous(), y, z.contiguous(), dz, gated), (size,), (GATE_BLOCK,), 4
    )
    return gated
