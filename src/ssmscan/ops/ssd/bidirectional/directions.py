"""The scans of the two directions, which may share arguments."""

from collections.abc import Callable

from torch import Tensor

from ssmscan.ops.ssd.autograd import Inputs as Scan
from ssmscan.ops.ssd.bidirectional.autograd import Inputs


def directions(inputs: Inputs) -> tuple[Scan, Scan]:
    """The scan from the left, with D, and the one from the right; neither has the gate."""
    x, dt, A, B, C, D, _, dt_rev, B_rev, C_rev, dt_bias, h0, sequence = inputs
    return Scan(x, dt, A, B, C, D, None, dt_bias, h0, sequence), Scan(
        x,
        dt if dt_rev is None else dt_rev,
        A,
        B if B_rev is None else B_rev,
        C if C_rev is None else C_rev,
        None,
        None,
        dt_bias,
        h0,
        sequence,
    )


def total(gradient: Tensor | None, back: Tensor | None) -> Tensor | None:
    """The gradient of an argument of both scans."""
    return gradient if back is None else back if gradient is None else gradient + back


def shared(
    gradient: Tensor | None,
    back: Tensor | None,
    own: Tensor | None,
    add: Callable[[Tensor | None, Tensor | None], Tensor | None] = total,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of an argument of the scan from the left, and of the other scan's ``own``, if it has one."""
    return (add(gradient, back), None) if own is None else (gradient, back)
