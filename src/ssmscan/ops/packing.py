"""How an operation begins, and packed sequences: the check of ``cu_seqlens`` and the form in which kernels read it.

A kernel needs only to know, at each token, whether a neighbour belongs to another sequence. So ``cu_seqlens`` becomes
one int32 sequence number per token: the same for both directions, safe for any content, made without a host
synchronisation.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ssmscan.backend import choose
from ssmscan.ops.registration import observed
from ssmscan.shapes import INDEX, check_dense, check_shape, error

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def enter(
    function: str,
    backend: str,
    x: Tensor,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    axes: str,
    state: Sequence[int],
    sources: str = "x",
) -> tuple[str, Tensor | None, Tensor | None]:
    """What every sequence operation begins with, once its other arguments are checked.

    Args:
        function, backend: the names of the operation and of the backend asked for.
        x: the input (b, l, ...).
        dtype: that of states and sums.
        cu_seqlens, h0: as given to the operation.
        axes, state: the axes of a state after its first one, as in "d, n", and their lengths.
        sources: the arguments which set these lengths.

    Returns:
        The backend that runs, the sequence number of each token and the initial states. Of packed sequences without
        h0 these are zeros, expanded from one number for each sequence, as there can be many.
    """
    implementation = choose(function, backend, x.device.type, _REAL.get(dtype, dtype))
    count = check_sequences(function, x, cu_seqlens, h0, axes, state, sources)
    if cu_seqlens is None:
        return implementation, None, h0
    sequence, valid = pack(cu_seqlens, x.shape[1])
    start = x.new_zeros(count, *(1 for _ in state), dtype=dtype) if h0 is None else h0
    start = torch.where(valid, start, torch.nan)
    return implementation, sequence, start.expand(count, *state) if h0 is None else start


def check_sequences(
    function: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    axes: str,
    state: Sequence[int],
    sources: str = "x",
) -> int:
    """How many sequences x holds. ``cu_seqlens`` must fit x, and h0 must have one state for each of them."""
    if cu_seqlens is None:
        count, axes = x.shape[0], f"b, {axes}"
    else:
        check_cu_seqlens(function, cu_seqlens, x)
        count, axes = cu_seqlens.shape[0] - 1, f"s, {axes}"
        sources = f"{sources.replace(' and ', ', ')} and cu_seqlens"
    check_shape(function, "h0", h0, axes, (count, *state), sources)
    return count


def check_cu_seqlens(function: str, cu_seqlens: Tensor, x: Tensor) -> None:
    """``cu_seqlens`` is (s+1,), int32 or int64, 0 = c_0 <= c_1 <= … <= c_s = l, and x is (1, l, ...).

    The values are not read on a GPU, for that would stall the stream, nor where a compiler or a mode sees the call, for
    there may be none; see :func:`pack` for what happens to bad ones.
    """
    check_dense(function, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in INDEX:
        raise TypeError(error(function, "cu_seqlens must be int32 or int64", cu_seqlens.dtype, "Convert it."))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(error(function, "cu_seqlens must have shape (s+1,)", tuple(cu_seqlens.shape)))
    if cu_seqlens.device != x.device:
        rule = f"cu_seqlens must be on the device of x, {x.device}"
        raise ValueError(error(function, rule, cu_seqlens.device, "Move it there."))
    b, l = x.shape[:2]
    if b != 1:
        raise ValueError(
            error(function, "x must have batch 1 with cu_seqlens", b, "Concatenate the sequences along the length.")
        )
    if cu_seqlens.is_cpu and not observed((cu_seqlens,)):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != l:
            rule = f"cu_seqlens must start at 0 and end at the length {l}"
            raise ValueError(error(function, rule, f"{values[0]} … {values[-1]}"))
        for before, after in pairwise(values):
            if after < before:
                raise ValueError(error(function, "cu_seqlens must not decrease", f"{before} then {after}"))


def pack(cu_seqlens: Tensor, l: int) -> tuple[Tensor, Tensor]:
    """The sequence number of each token, (l,) int32, and whether ``cu_seqlens`` is sound, (), bool.

    Where it is not and could not be refused, the operation makes every output NaN.
    """
    ends = cu_seqlens[1:]
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == l) & (ends >= cu_seqlens[:-1]).all()
    tokens = torch.arange(l, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(ends, tokens, right=True).clamp_(max=max(ends.shape[0] - 1, 0))
    return sequence.to(torch.int32), valid


def first_tokens(sequence: Tensor, reverse: bool) -> Tensor:
    """Which tokens, (l,) bool, come first in their sequence in scan order."""
    changes = sequence[1:] != sequence[:-1]
    edge = sequence[:1] == sequence[:1]
    return torch.cat([changes, edge] if reverse else [edge, changes])


def last_tokens(sequence: Tensor, s: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The last token of each of the s sequences in scan order, and whether the sequence is empty; both (s,)."""
    numbers = torch.arange(s, device=sequence.device, dtype=sequence.dtype)
    first, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    token = first if reverse else end - 1
    return token.clamp(0, sequence.shape[0] - 1), first == end
