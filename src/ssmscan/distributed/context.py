"""Context parallelism: each rank has a stretch of the sequence, and hands its state on."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssmscan import causal_conv1d, linear_scan, matrix_scan, rg_lru, s4d, selective_scan, ssd, ssd_bidirectional
from ssmscan.distributed.halo import halo, last_inputs
from ssmscan.distributed.handover import exchange, with_backward_of
from ssmscan.distributed.scan import Stretch, scan
from ssmscan.ops.recurrence import decay_rates
from ssmscan.shapes import INDEX, check_flags, check_tensors, error, state_dtype

# Of every operation that runs here; to make one takes as long as a small kernel.
SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {
    op: inspect.signature(op)
    for op in (linear_scan, matrix_scan, selective_scan, ssd, ssd_bidirectional, rg_lru, s4d, causal_conv1d)
}


# A compiler breaks its graph here: traced, the collectives are not waited for, and views of what they bring fail.
@torch.compiler.disable
def context_parallel(op: Callable[..., Any], *args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
    """Run a sequence operation over a sequence that is split over the ranks of ``group``, in their order.

        h_{r+1} = P_r · h_r + s_r,    y_r = op(x_r, h0 = h_r)

    s_r is what rank r makes of no state, P_r the product of its decays. Both go to all ranks in one collective of
    float32 numbers (float64 for float64 inputs), at most the size of two states whatever the length, and each rank
    composes the state that enters it. A backward has a collective of its own.

    Args:
        op: one of linear_scan, matrix_scan, selective_scan, ssd, ssd_bidirectional, rg_lru, s4d and causal_conv1d.
        args, kwargs: its arguments. Those with a time axis are this rank's stretch of them, of any length, none too.
            All others are the same on every rank; cu_seqlens are the bounds in the whole sequence, h0 is the state
            that enters it.
        group: the ranks; None is all.

    Returns:
        y of this rank's stretch, and the state after the whole sequence, the same on every rank; of ssd_bidirectional
        y alone.

    Gradients of the tensors with a time axis are whole. Those of the others are this rank's share, to be summed over
    the ranks as in data parallelism; that of h0 comes on the rank that the scan begins at.

    Raises:
        NotImplementedError: another operation, matrix_scan by cumsum_log_a, rg_lru with scale_first=False on packed
            sequences.
        ValueError, TypeError: what op itself refuses, or bounds that do not fit the whole sequence.

    Example, of one process; under torchrun the group is there already:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> from ssmscan import linear_scan
        >>> from ssmscan.distributed import context_parallel
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        ...     y, h = context_parallel(linear_scan, torch.ones(1, 3, 1), torch.full((1, 3, 1), 0.5))
        ...     dist.destroy_process_group()
        >>> y.flatten().tolist(), h.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    group = group or dist.group.WORLD
    assert group is not None
    if op not in SIGNATURES:
        known = ", ".join(one.__name__ for one in SIGNATURES)
        raise NotImplementedError(error("context_parallel", f"op must be one of {known}", getattr(op, "__name__", op)))
    bound = SIGNATURES[op].bind(*args, **kwargs)
    given = {name: value for name, value in bound.arguments.items() if value is not None}
    check_flags(op.__name__, A_is_log=given.get("A_is_log", False))
    if given.pop("A_is_log", False):
        check_tensors(op.__name__, {"A": given.get("A")})
        given["A"] = decay_rates(given["A"], True, torch.promote_types(given["A"].dtype, torch.float32))
    if op is ssd_bidirectional:
        return _bidirectional(group, **given)
    _check_supported(op, given)
    reverse, h0 = given.get("reverse", False), given.pop("h0", None)
    x, rank = given["x"], dist.get_rank(group)
    order = range(dist.get_world_size(group))[:: -1 if reverse else 1]
    first = rank == order[0]
    unscaled = op is rg_lru and not given.get("scale_first", True) and h0 is None
    if given.get("cu_seqlens") is not None or unscaled:
        lengths = lengths_of(x.shape[1], x.device, group)
        # Behind ranks without tokens a sequence begins at this one.
        first = first or (unscaled and not any(lengths[before] for before in order[: order.index(rank)]))
        if not unscaled:
            given["cu_seqlens"] = _own_bounds(given["cu_seqlens"], lengths, rank)

    if op is rg_lru:
        given["scale_first"] = not (unscaled and first)
    if op is causal_conv1d:
        return _convolve(given, h0, first, group, reverse)
    return scan(Stretch(op, given, group, reverse), first, h0)


def _bidirectional(
    group: dist.ProcessGroup,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_rev: Tensor | None = None,
    B_rev: Tensor | None = None,
    C_rev: Tensor | None = None,
    shift: bool = False,
    **options: Any,
) -> Tensor:
    """Both scans, each handed on in its own direction, and their sum in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    both = [torch.zeros_like(wide) if D is None else wide * D.to(wide.dtype).view(x.shape[2], -1)]
    back = (dt if dt_rev is None else dt_rev, B if B_rev is None else B_rev, C if C_rev is None else C_rev)
    for (steps, write, read), reverse in (((dt, B, C), False), (back, True)):
        y, _ = context_parallel(ssd, x, steps, A, write, read, group=group, reverse=reverse, **options)
        if shift:
            # What a convolution makes of the token before alone.
            taps = y.new_tensor([1.0, 0.0]).expand(y.shape[2] * y.shape[3], 2)
            packing = {name: options[name] for name in ("cu_seqlens", "backend") if name in options}
            flat = y.flatten(2)
            y = context_parallel(causal_conv1d, flat, taps, group=group, reverse=reverse, **packing)[0].view(y.shape)
        both.append(y)
    total = both[0] + both[1] + both[2]
    return (total if z is None else total * F.silu(z.to(wide.dtype))).to(x.dtype)


def _convolve(
    given: dict[str, Any], h0: Tensor | None, first: bool, group: dist.ProcessGroup, reverse: bool
) -> tuple[Tensor, Tensor]:
    """A convolution, whose state is the inputs before this rank's."""
    dtype = state_dtype(given["x"], given["weight"], given.get("bias"), h0)
    known = h0 if first else None
    last, new = last_inputs(given["x"], given["weight"].shape[1] - 1, given.get("cu_seqlens"), known, reverse)
    if h0 is not None:
        # Where h0 alone asks for a gradient, all ranks have to be there in the backward.
        last = with_backward_of(last, h0)
    entering, leaving = halo(last.to(dtype), new, group, reverse)
    y, _ = causal_conv1d(**given, h0=known if first else entering)
    # The first rank has no use for what enters, and one without tokens none for anything.
    return with_backward_of(y, entering), leaving


def lengths_of(length: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How many tokens each rank has."""
    return exchange(torch.tensor([length], device=device), group)().flatten().tolist()


def _own_bounds(cu_seqlens: Tensor, lengths: list[int], rank: int) -> Tensor:
    """The bounds of all sequences within this rank's tokens; most are empty."""
    if cu_seqlens.dtype not in INDEX or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        rule = "cu_seqlens must be a row of int32 or int64 with one bound at least"
        raise ValueError(error("context_parallel", rule, f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"))
    if cu_seqlens.is_cpu and (cu_seqlens[0] != 0 or cu_seqlens[-1] != sum(lengths) or (cu_seqlens.diff() < 0).any()):
        rule = f"cu_seqlens must rise from 0 to the {sum(lengths)} tokens of all ranks"
        raise ValueError(error("context_parallel", rule, cu_seqlens.tolist()))
    return (cu_seqlens - sum(lengths[:rank])).clamp(0, lengths[rank])


def _check_supported(op: Callable[..., Any], given: dict[str, Any]) -> None:
    if given.get("cumsum_log_a") is not None:
        rule = "cumsum_log_a must be None, for a sum tells nothing of the decay between two ranks"
        raise NotImplementedError(error("context_parallel", rule, "a tensor", "Give log_a."))
    if op is rg_lru and not given.get("scale_first", True) and given.get("cu_seqlens") is not None:
        rule = "scale_first must be True with cu_seqlens"
        raise NotImplementedError(error("context_parallel", rule, False))
