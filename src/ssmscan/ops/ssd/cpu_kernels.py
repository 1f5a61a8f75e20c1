"""The Numba kernels of ssd: chunk after chunk of some heads of one group, by matrix products in a core's cache.

Within a chunk, w_ij is the decay from token j to i, e_i that from the chunk's begin to i and l_j that from j to its
end. All are products of the tokens' decays, taken as the recurrence takes them, so they are safe for any decay. With h
the state that enters a chunk, n by p as in all buffers here, and g the adjoint of the one that leaves it:

    y_i = Σ_j w_ij Δ_j (C_i·B_j) x_j + e_i C_i h,    dx_j = Δ_j (Σ_i w_ij (C_i·B_j) dy_i + l_j g B_j),
    dC_i = Σ_j w_ij Δ_j (dy_i·x_j) B_j + e_i dy_i h,    dB_j = Δ_j (Σ_i w_ij (dy_i·x_j) C_i + l_j x_j g),
    dlog_a_t = what flows from tokens before t to those from t on.

A chunk belongs to one sequence, and ends early where decays above 1 would make some w_ij overflow: infinity times 0
where the recurrence has a state of 0. Inner loops run over whole rows, beyond the tokens and channels that there are;
what lies there is never a term of a sum, so it may be a NaN of another sequence.
"""

from math import exp, log1p

import numpy as np

from ssmscan.ops._numba.compiled import compiled
from ssmscan.ops.ssd.cpu_buffers import (
    CHUNK,
    add_columns,
    add_products,
    add_skip,
    add_turned,
    add_up,
    buffer,
    clear,
    decay,
    decay_to,
    decays,
    dots,
    exchange,
    gather,
    numbers,
    pair_up,
    put,
    put_flows,
    put_turned,
    scale,
    score,
    sum_columns,
    transpose,
    weigh,
)
from ssmscan.ops.ssd.products import (
    add_lower_product,
    add_product,
    add_product_by_lower,
    add_product_of_lower,
    add_product_of_upper,
    whole,
)

# Tokens of which a thread finds the steps, and elements that it sums, at once.
STRETCH, SUMS = 256, 1 << 16
# By how much a state may grow within a chunk: far from what overflows, and far more than the decays of a stable system.
LARGEST = 2.0**40


@compiled
def step_size(raw, softplus, low, high):
    """The step size, and its derivative by dt; beyond 20 softplus is taken for straight, as PyTorch does."""
    zero, one = type(raw)(0), type(raw)(1)
    size, slope = raw, one
    if softplus and not raw > 20:
        e = exp(-abs(raw))
        size = (raw if raw > 0 else zero) + log1p(e)
        slope = (one if raw > 0 else e) / (one + e)
    if size < low:
        return type(raw)(low), zero
    if size > high:
        return type(raw)(high), zero
    return size, slope


@compiled
def steps(out, dt, A, bias, softplus, low, high, number, batch, begin):
    """Step sizes and decays, (2, b, l, h), of a stretch of tokens."""
    for t in range(begin, min(begin + STRETCH, dt.shape[1])):
        for head in range(dt.shape[2]):
            size, _ = step_size(dt[batch, t, head] + bias[head], softplus, low, high)
            out[0, batch, t, head] = size
            out[1, batch, t, head] = exp(size * A[head])


@compiled
def step_gradients(ddt, dA, dbias, dsteps, dt, A, bias, softplus, low, high, number, batch, begin):
    """From the gradients of step sizes and log-decays; each stretch has its own part of dA and of dbias."""
    for t in range(begin, min(begin + STRETCH, dt.shape[1])):
        for head in range(dt.shape[2]):
            size, slope = step_size(dt[batch, t, head] + bias[head], softplus, low, high)
            dlog = dsteps[1, batch, t, head]
            gradient = slope * (dsteps[0, batch, t, head] + A[head] * dlog)
            ddt[batch, t, head] = gradient
            dA[number, head] += dlog * size
            dbias[number, head] += gradient


@compiled
def cut(decays, owner, reverse):
    """The first position in scan order, the length and the sequence of each chunk, (chunks, 3), for all heads alike."""
    batch, l, heads = decays.shape
    chunks = np.empty((l, 3), np.int64)
    count, growth = 0, 1.0
    for position in range(l):
        t = l - 1 - position if reverse else position
        largest = 1.0
        for i in range(batch):
            for head in range(heads):
                if decays[i, t, head] > largest:
                    largest = decays[i, t, head]
        growth *= largest
        overflows = largest > 1 and growth > LARGEST
        if count == 0 or chunks[count - 1, 1] == CHUNK or chunks[count - 1, 2] != owner[t] or overflows:
            chunks[count, 0], chunks[count, 1], chunks[count, 2] = position, 0, owner[t]
            count, growth = count + 1, largest
        chunks[count - 1, 1] += 1
    return chunks[:count]


@compiled
def forward(x, steps, B, C, D, chunks, final, y, per_group, reverse, part, batch, first, end):
    """The heads from ``first`` to ``end``, all of one group. ``final`` holds the initial states."""
    l, p, n, group = x.shape[1], x.shape[3], B.shape[3], first // per_group
    step = -1 if reverse else 1
    Bs, Cs, turned = buffer(CHUNK, n, x), buffer(CHUNK, n, x), buffer(n, CHUNK, x)
    xs, ys = buffer(CHUNK, p, x), buffer(CHUNK, p, x)
    products, scores = buffer(CHUNK, CHUNK, x), buffer(CHUNK, CHUNK, x)
    delta, entered, left = numbers(x), numbers(x), numbers(x)
    h = np.zeros((end - first, whole(n), whole(p)), x.dtype)
    now = -1
    for c in range(chunks.shape[0]):
        begin, count, s = chunks[c, 0], chunks[c, 1], batch + chunks[c, 2]
        t = l - 1 - begin if reverse else begin
        if s != now:
            exchange(h, final, first, end, now, s)
            now = s
        gather(Bs, B, batch, t, step, count, group)
        gather(Cs, C, batch, t, step, count, group)
        transpose(turned, Bs, count, n)
        clear(products, count)
        add_lower_product(products, Cs, turned, count, n)
        for head in range(first, end):
            state = h[head - first]
            decays(scores, entered, delta, steps, batch, t, step, count, head)
            weigh(left, scores[count - 1], delta)
            score(scores, products, delta, count)
            gather(xs, x, batch, t, step, count, head)
            clear(ys, count)
            add_product(ys, Cs, state, count, n, p)
            scale(ys, entered, count)
            add_product_of_lower(ys, scores, xs, count, p)
            if D.size > 0:
                add_skip(ys, D[head], xs, count)
            put(y, ys, batch, t, step, count, head)
            scale(xs, left, count)
            decay(state, entered[count - 1], n)
            add_product(state, Bs.T, xs, n, count, p)
    exchange(h, final, first, end, now, -1)


@compiled
def _states(kept, x, steps, B, chunks, initial, group, reverse, batch, first, end):
    """The states that enter each chunk."""
    l, p, n = x.shape[1], x.shape[3], B.shape[3]
    step = -1 if reverse else 1
    Bs, xs, left = buffer(CHUNK, n, x), buffer(CHUNK, p, x), numbers(x)
    for c in range(chunks.shape[0]):
        begin, count, s = chunks[c, 0], chunks[c, 1], batch + chunks[c, 2]
        t = l - 1 - begin if reverse else begin
        if c == 0 or chunks[c, 2] != chunks[c - 1, 2]:
            exchange(kept[c], initial, first, end, -1, s)
        if c + 1 == chunks.shape[0] or chunks[c, 2] != chunks[c + 1, 2]:
            continue
        gather(Bs, B, batch, t, step, count, group)
        for head in range(first, end):
            product = x.dtype.type(1)
            for i in range(count - 1, -1, -1):
                left[i] = product * steps[0, batch, t + i * step, head]
                product *= steps[1, batch, t + i * step, head]
            gather(xs, x, batch, t, step, count, head)
            scale(xs, left, count)
            after = kept[c + 1, head - first]
            decay_to(after, kept[c, head - first], product, n)
            add_product(after, Bs.T, xs, n, count, p)


@compiled
def backward(
    x, steps, B, C, D, dy, chunks, initial, g, dx, dsteps, dB, dC, dD, per_group, reverse, part, batch, first, end
):  # fmt: skip
    """The heads from ``first`` to ``end``, all of one group; ``g`` holds the adjoints of the final states."""
    l, p, n, group = x.shape[1], x.shape[3], B.shape[3], first // per_group
    step = -1 if reverse else 1
    kept = np.empty((chunks.shape[0], end - first, whole(n), whole(p)), x.dtype)
    _states(kept, x, steps, B, chunks, initial, group, reverse, batch, first, end)
    Bs, Cs, sums = buffer(CHUNK, n, x), buffer(CHUNK, n, x), buffer(CHUNK, n, x)
    turned_B, turned_C, turned = buffer(n, CHUNK, x), buffer(n, CHUNK, x), buffer(n, CHUNK, x)
    turned_dB, turned_dC = buffer(n, CHUNK, x), buffer(n, CHUNK, x)
    xs, dys, dxs = buffer(CHUNK, p, x), buffer(CHUNK, p, x), buffer(CHUNK, p, x)
    turned_x, turned_dy = buffer(p, CHUNK, x), buffer(p, CHUNK, x)
    CB, dCB = buffer(CHUNK, CHUNK, x), buffer(CHUNK, CHUNK, x)
    scores, products = buffer(CHUNK, CHUNK, x), buffer(CHUNK, CHUNK, x)
    delta, entered, left = numbers(x), numbers(x), numbers(x)
    own, onward, arriving = numbers(x), numbers(x), numbers(x)
    through = np.zeros(n, x.dtype)
    adjoints = np.zeros((end - first, whole(n), whole(p)), x.dtype)
    now = -1
    for c in range(chunks.shape[0] - 1, -1, -1):
        begin, count, s = chunks[c, 0], chunks[c, 1], batch + chunks[c, 2]
        t = l - 1 - begin if reverse else begin
        if s != now:
            exchange(adjoints, g, first, end, now, s)
            now = s
        gather(Bs, B, batch, t, step, count, group)
        gather(Cs, C, batch, t, step, count, group)
        transpose(turned_B, Bs, count, n)
        transpose(turned_C, Cs, count, n)
        clear(turned_dB, n)
        clear(turned_dC, n)
        clear(CB, count)
        clear(dCB, count)
        add_lower_product(CB, Cs, turned_B, count, n)
        for head in range(first, end):
            h, adjoint = kept[c, head - first], adjoints[head - first]
            decays(scores, entered, delta, steps, batch, t, step, count, head)
            left[:] = scores[count - 1]
            gather(xs, x, batch, t, step, count, head)
            gather(dys, dy, batch, t, step, count, head)
            transpose(turned_x, xs, count, p)
            transpose(turned_dy, dys, count, p)
            # Of pairs of tokens: dy_i·x_j.
            clear(products, count)
            add_lower_product(products, dys, turned_x, count, p)
            pair_up(products, scores, CB, dCB, own, delta, count)
            clear(dxs, count)
            add_product(dxs, Bs, adjoint, count, n, p)
            scale(dxs, left, count)
            dots(onward, dxs, xs, count, p)
            add_product_of_upper(dxs, scores.T, dys, count, p)
            scale(dxs, delta, count)
            if D.size > 0:
                add_skip(dxs, D[head], dys, count)
                add_products(dD[batch, head], xs, dys, count)
            put(dx, dxs, batch, t, step, count, head)
            # What the states give to dB and dC.
            clear(turned, n)
            add_product(turned, adjoint, turned_x, n, p, count)
            weigh(left, left, delta)
            add_columns(turned_dB, turned, left, n)
            clear(turned, n)
            add_product(turned, h, turned_dy, n, p, count)
            add_columns(turned_dC, turned, entered, n)
            sum_columns(arriving, turned, turned_C, entered, n)
            dots(through, h, adjoint, n, p)
            put_flows(
                dsteps, products, delta, own, onward, arriving, entered[count - 1] * add_up(through, n),
                batch, t, step, count, head,
            )  # fmt: skip
            scale(dys, entered, count)
            decay(adjoint, entered[count - 1], n)
            add_product(adjoint, Cs.T, dys, n, count, p)
        add_product_by_lower(turned_dB, turned_C, dCB, n, count)
        clear(sums, count)
        add_product_of_lower(sums, dCB, Bs, count, n)
        put_turned(dB[part], turned_dB, batch, t, step, count, group)
        add_turned(sums, turned_dC, count, n)
        put(dC[part], sums, batch, t, step, count, group)
    exchange(adjoints, g, first, end, now, -1)


@compiled
def total(parts, out, begin):
    """Sum the parts, (parts, size), of some elements."""
    to = out[begin : begin + SUMS]
    to[:] = 0
    for part in range(parts.shape[0]):
        given = parts[part, begin : begin + SUMS]
        for j in range(to.shape[0]):
            to[j] += given[j]
