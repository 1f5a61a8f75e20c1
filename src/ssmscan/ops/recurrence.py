"""The diagonal recurrence h = a·h + u in plain PyTorch, differentiable any number of times, on any device.

The length is cut into chunks of 16 steps. All chunks advance together, one step at a time and twice: from zero, which
gives what each adds, and from the states that enter them. Those follow the same recurrence, with a step for each chunk.
So 32 steps of Python make a level and a sequence of 2^24 has six levels.

A chunk keeps the product of its decays. It may be far too large for a number where every state is small, as before the
first input of a system that grows, and inf·0 would be NaN. So it is kept as m·4^k, and any decay is safe: above 1, zero
and negative too. Nothing is ever divided.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmscan.ops.packing import first_tokens, last_tokens

CHUNK = 16


def recurrence(a: Tensor, u: Tensor, h: Tensor, sequence: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """All states from the initial h on, in the shape (b, l, ...) of u, with which a broadcasts, and the final ones."""
    if u.shape[1] == 0:
        return a * u, h.clone()
    if sequence is None:
        hs = _directed(a, u, None, h, reverse)
        return hs, hs[:, 0 if reverse else -1].clone()
    start = first_tokens(sequence, reverse)
    u = torch.where(_beside(start, u), a * h[sequence] + u, u)
    hs = _directed(a, u, start, torch.zeros_like(u[:, 0]), reverse)
    token, empty = last_tokens(sequence, h.shape[0], reverse)
    return hs, torch.where(_beside(empty, u), h, hs[0, token])


def decay_rates(A: Tensor, is_log: bool, dtype: torch.dtype) -> Tensor:
    """A, or of log(-A) in its place -exp(A), in ``dtype``."""
    return -torch.exp(A.to(dtype)) if is_log else A


def carry(
    m: Tensor, k: Tensor, u: Tensor, h: Tensor, first: Tensor | None, owner: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states before and after each step of h = m·4^k·h + u, both in the shape (b, l, ...) of u; see :func:`scan`.

    Of packed sequences ``first`` says which steps are the first of one, and ``owner`` whose initial state that takes.
    """
    if first is None:
        after = scan(m, k, u, None, h)
        return torch.cat([h[:, None], after[:, :-1]], 1), after
    given, half, start = h[owner][None], _power(k), _beside(first, u)
    u = u + torch.where(start, m * half * given * half, 0)
    after = scan(m, k, u, first, torch.zeros_like(u[:, 0]))
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    return torch.where(start, given, before), after


def _beside(flags: Tensor, u: Tensor) -> Tensor:
    """One flag for all that u (b, l, ...) holds for a token, or h for a sequence."""
    return flags.view(-1, *(1,) * (u.dim() - 2))


def _directed(a: Tensor, u: Tensor, start: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    if not reverse:
        return scan(a, None, u, start, h)
    return scan(a.flip(1), None, u.flip(1), None if start is None else start.flip(0), h).flip(1)


def scan(m: Tensor, k: Tensor | None, u: Tensor, start: Tensor | None, h: Tensor) -> Tensor:
    """All states (b, l, ...) of h = m·4^k·h + u, where a token with ``start`` forgets what came before it.

    Without k it is 0; with it, m is as :func:`scaled_exp` has it.
    """
    l = u.shape[1]
    # A compiled graph with fewer steps would serve one length alone.
    size = CHUNK if torch.compiler.is_compiling() else min(CHUNK, l)
    n = (l + size - 1) // size
    pad = n * size - l

    def split(v: Tensor) -> Tensor:
        return F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)).unflatten(1, (n, size))

    m, u, k = split(m), split(u), None if k is None else split(k)
    if start is not None:
        start = F.pad(start, (0, pad)).view(n, size, *(1,) * (u.dim() - 3))
    # Half of the factor comes before the state and half after, so that it may exceed what a number holds.
    half = None if k is None else _power(k)
    decays = (m if half is None else m * half).unbind(2)
    halves = None if half is None else half.unbind(2)
    inputs = u.unbind(2)
    starts = None if start is None else start.unbind(1)

    def advance(i: int, h: Tensor) -> Tensor:
        if starts is not None:
            # Not by a decay of zero: 0·NaN would carry a NaN into the next packed sequence, or its gradient back.
            h = torch.where(starts[i], 0, h)
        if halves is None:
            return torch.addcmul(inputs[i], decays[i], h)
        return torch.addcmul(inputs[i], decays[i] * h, halves[i])

    if n == 1:
        state = h[:, None]
    else:
        # Padding makes the last chunk's total wrong; nothing enters from it.
        total = inputs[0]
        for i in range(1, CHUNK):
            total = advance(i, total)
        forgets = None
        if start is not None:
            # What enters these chunks does not leave them. Their decays may be NaN, or lead one back.
            forgets = start.any(1, keepdim=True)
            m, k = torch.where(forgets, 1, m), None if k is None else torch.where(forgets, 0, k)
            forgets = forgets.view(n)
        entered = scan(*_product(m, k), total, forgets, h)
        state = torch.cat([h[:, None], entered[:, :-1]], 1)
    states = []
    for i in range(size):
        state = advance(i, state)
        states.append(state)
    return torch.stack(states, 2).flatten(1, 2)[:, :l]


def _product(m: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The products of the 16 steps on the third axis."""
    # Those of four are taken as they are, for decays up to 4e9: to scale each one would cost as much as all the rest.
    fours, more = _scaled(_multiply(m.unflatten(2, (4, 4)), 3))
    more = more.sum(2)
    product, most = _scaled(_multiply(fours, 2))
    return product, most + (more if k is None else more + k.sum(2))


def _multiply(v: Tensor, axis: int) -> Tensor:
    """The product of four numbers along an axis."""
    a, b, c, d = v.unbind(axis)
    return (a * b) * (c * d)


def scaled_exp(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log_a), which may overflow, as m·4^k: |m| is from 1/2 to 2 unless all is 0 or infinite; k is whole."""
    k = (log_a.detach().real / math.log(4)).round().clamp(-(1 << 20), 1 << 20)
    return torch.exp(log_a - math.log(4) * k), k


def grown(v: Tensor, log: Tensor) -> Tensor:
    """v·exp(log), where exp(log) alone may overflow: of v = 0 it is 0."""
    half = (log / 2).clamp(max=log_largest(v)).exp()
    return v * half * half


def log_largest(v: Tensor) -> int:
    """A whole number below the logarithm of the largest number."""
    return math.floor(math.log(torch.finfo(v.dtype).max))


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a itself."""
    bound = _bound(a)
    k = (a.detach().abs().log2() / 2).round().clamp(-bound, bound)
    return a * torch.exp2(-2 * k), k


def _power(k: Tensor) -> Tensor:
    """2^k; where it would overflow, something so large that its square times any normal number does."""
    return torch.exp2(k.clamp(max=2 * _bound(k)))


def _bound(a: Tensor) -> int:
    """The largest k for which 4^k and 4^-k are normal numbers."""
    return int(math.log2(torch.finfo(a.dtype).max)) // 2 - 1
