"""What ssd's Numba kernels do with the buffers of a chunk, beside matrix products.

A chunk's tokens are the rows of its buffers, or the columns of turned ones. Each loop stands in a function of its own,
in which Numba counts no references, and writes one row, which lets LLVM vectorise it.
"""

import numpy as np

from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops.ssd.products import whole

CHUNK = 64


@compiled
def buffer(rows, columns, like):
    """Room for whole tiles."""
    return np.zeros((whole(rows), whole(columns)), like.dtype)


@compiled
def numbers(like):
    return np.zeros(CHUNK, like.dtype)


@compiled
def _load(h, states, s, head):
    for i in range(states.shape[2]):
        for j in range(states.shape[3]):
            h[j, i] = states[s, head, i, j]


@compiled
def _store(h, states, s, head):
    for i in range(states.shape[2]):
        for j in range(states.shape[3]):
            states[s, head, i, j] = h[j, i]


@compiled
def exchange(h, states, first, end, before, after):
    """Put the heads' states away as those of the sequence ``before``, and take those of ``after``; -1 is none."""
    for head in range(first, end):
        if before >= 0:
            _store(h[head - first], states, before, head)
        if after >= 0:
            _load(h[head - first], states, after, head)


@compiled
def transpose(out, rows, count, columns):
    for i in range(count):
        row = rows[i]
        for j in range(columns):
            out[j, i] = row[j]


@compiled
def gather(out, source, batch, t, step, count, head):
    """The tokens of a chunk, of one head or group, as rows."""
    for i in range(count):
        row, given = out[i], source[batch, t + i * step, head]
        for j in range(given.shape[0]):
            row[j] = given[j]


@compiled
def clear(out, count):
    for i in range(count):
        out[i] = 0


@compiled
def scale(rows, factors, count):
    """Each row by its own factor."""
    for i in range(count):
        row, factor = rows[i], factors[i]
        for j in range(row.shape[0]):
            row[j] *= factor


@compiled
def decay(h, factor, n):
    """All of a state by one factor."""
    for j in range(n):
        row = h[j]
        for i in range(row.shape[0]):
            row[i] *= factor


@compiled
def decay_to(after, h, factor, n):
    """The same, out of place: as one loop for both it would not be vectorised where the two are one."""
    for j in range(n):
        to, row = after[j], h[j]
        for i in range(row.shape[0]):
            to[i] = factor * row[i]


# Sums may be taken in vectors; the order is still the same every time.
@compiled(fastmath={"reassoc", "contract"})
def _dot(a, b, size):
    total = a.dtype.type(0)
    for j in range(size):
        total += a[j] * b[j]
    return total


@compiled(fastmath={"reassoc"})
def add_up(a, size):
    total = a.dtype.type(0)
    for j in range(size):
        total += a[j]
    return total


@compiled
def decays(pairs, entered, delta, steps, batch, t, step, count, head):
    """w, with zeros above the diagonal, of which the last row is l; e, and the tokens' Δ."""
    tiny = np.finfo(pairs.dtype).tiny
    zero = pairs.dtype.type(0)
    for i in range(count):
        delta[i], decay = steps[0, batch, t + i * step, head], steps[1, batch, t + i * step, head]
        entered[i] = decay if i == 0 else decay * entered[i - 1]
        row = pairs[i]
        if i == 0:
            row[:] = 0
        else:
            before = pairs[i - 1]
            for j in range(CHUNK):
                w = decay * before[j]
                # Some processors are slow with numbers below the normal ones.
                row[j] = zero if abs(w) < tiny else w
        row[i] = 1


@compiled
def weigh(out, row, factors):
    for j in range(CHUNK):
        out[j] = row[j] * factors[j]


@compiled
def score(scores, products, delta, count):
    """The decays become the terms with which each x enters each y."""
    for i in range(count):
        row, product = scores[i], products[i]
        for j in range(CHUNK):
            row[j] *= product[j] * delta[j]


@compiled
def put(out, rows, batch, t, step, count, head):
    """The opposite of gathering."""
    for i in range(count):
        to, row = out[batch, t + i * step, head], rows[i]
        for j in range(to.shape[0]):
            to[j] = row[j]


@compiled
def add_skip(out, D, rows, count):
    """D·x, or D·dy."""
    for i in range(count):
        to, row = out[i], rows[i]
        for j in range(D.shape[0]):
            to[j] += D[j] * row[j]


@compiled
def pair_up(products, scores, CB, dCB, own, delta, count):
    """Of each pair of tokens: add to dCB, to the earlier one's dΔ, and find what flows and the scores."""
    own[:] = 0
    for i in range(count):
        product, w, cb, total = products[i], scores[i], CB[i], dCB[i]
        for j in range(CHUNK):
            product[j] *= w[j]
        for j in range(CHUNK):
            total[j] += product[j] * delta[j]
        for j in range(CHUNK):
            w[j] *= cb[j]
        for j in range(CHUNK):
            product[j] *= cb[j]
        for j in range(CHUNK):
            own[j] += product[j]
        for j in range(CHUNK):
            product[j] *= delta[j]


@compiled
def dots(out, rows, others, count, size):
    for i in range(count):
        out[i] = _dot(rows[i], others[i], size)


@compiled
def add_products(out, rows, others, count):
    """Sums over the rows; those of a chunk by themselves first, which rounds less."""
    total = np.zeros(out.shape[0], out.dtype)
    for i in range(count):
        row, other = rows[i], others[i]
        for j in range(out.shape[0]):
            total[j] += row[j] * other[j]
    for j in range(out.shape[0]):
        out[j] += total[j]


@compiled
def add_columns(out, rows, factors, count):
    """Each column by its own factor."""
    for i in range(count):
        to, row = out[i], rows[i]
        for j in range(CHUNK):
            to[j] += factors[j] * row[j]


@compiled
def sum_columns(out, rows, others, factors, count):
    """out = factors·(sums over the rows of products)."""
    out[:] = 0
    for i in range(count):
        row, other = rows[i], others[i]
        for j in range(CHUNK):
            out[j] += row[j] * other[j]
    for j in range(CHUNK):
        out[j] *= factors[j]


@compiled
def put_flows(dsteps, products, delta, own, onward, arriving, through, batch, t, step, count, head):
    """The gradients of Δ and of the log-decay.

    Over token t flows what comes from before it to it and later ones: of a pair of tokens, of the entering state, to
    the leaving one. Sums of just these: where the decay is 0 they are 0 too.
    """
    flows = numbers(products)
    for i in range(count - 1, -1, -1):
        row = products[i]
        for j in range(CHUNK):
            flows[j] += row[j]
        flows[i] = 0
        through += arriving[i]
        dsteps[1, batch, t + i * step, head] = add_up(flows, i) + through
    passed = delta.dtype.type(0)
    for j in range(count):
        dsteps[0, batch, t + j * step, head] = own[j] + onward[j]
        dsteps[1, batch, t + j * step, head] += passed
        passed += onward[j] * delta[j]


@compiled
def put_turned(out, turned, batch, t, step, count, group):
    """Columns, as the tokens of a chunk."""
    for i in range(count):
        to = out[batch, t + i * step, group]
        for j in range(to.shape[0]):
            to[j] = turned[j, i]


@compiled
def add_turned(out, turned, count, n):
    for i in range(count):
        to = out[i]
        for j in range(n):
            to[j] += turned[j, i]
