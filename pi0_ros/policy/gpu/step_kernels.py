"""Triton kernels for the denoising steps on a GPU: a few dozen rows against weights that are read once a step.

A step is bound by reading weights and by launches, so a layer is six kernels, and norms, modulation, RoPE, GeGLU,
gates and residuals are part of the one that reads or writes their operand:

    project       q, k, v = RoPE(norm(x) W)     q to a buffer, k and v into the cache
    attention     over the cache, the keys in parallel splits; merge puts them together
    add_product   x += gate * (attended W)      the inner dimension in splits, summed by the last one to finish
    geglu         h = gelu(norm(x) Wg) * (norm(x) Wu)
    add_product   x += gate * (h W)

An RMS norm is a factor of its row, so a product goes over the plain rows and is scaled afterwards, by sums of squares
that whoever wrote the rows left for each of its tiles. pi0.5's adaptive scale is multiplied in by whoever wrote the
rows, its shift arrives multiplied with the matrix, as a bias. Splits are summed in their order, whichever comes last:
the same inputs give the same bits.

Matrices are [out, in], as torch's. Rows beyond `rows` are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pi0_ros.model.gemma import RMS_EPS

EPS = tl.constexpr(RMS_EPS)
ROWS = 64  # of a tile: what Hopper's matrix unit takes at least


# --- parts ------------------------------------------------------------------------------------------------------------


@triton.jit
def _product(
    x, w, row, live, column, begin, SPAN: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr = True,
):  # fmt: skip
    """x[row] w[column]^T over SPAN of the K inner columns from `begin` on, f32 [M, N]."""
    k = begin + tl.arange(0, BK)
    x += row[:, None] * K + k[None, :]
    w += column[None, :] * K + k[:, None]
    total = tl.zeros((M, N), tl.float32)
    for at in range(0, SPAN, BK):
        a = tl.load(x + at, mask=live[:, None], other=0.0)
        total = tl.dot(a, tl.load(w + at), total, input_precision="tf32x3" if EXACT else "tf32")
    return total


@triton.jit
def _sums(squares, row, live, CAPACITY: tl.constexpr, TILES: tl.constexpr):
    """What the kernel that wrote x left of each row: sums of squares by tile, f32 [tiles, rows]."""
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    there = (tile < TILES)[:, None] & live[None, :]
    return tl.load(squares + tile[:, None] * CAPACITY + row[None, :], mask=there, other=0.0)


@triton.jit
def _factor(sums, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row."""
    return tl.rsqrt(tl.sum(sums, axis=0) / WIDTH + EPS)[:, None]


@triton.jit
def _put(
    y, x, scaled, scales, entry, tables, squares, row, live, column, tile,
    WIDTH: tl.constexpr, ADAPTIVE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Columns of the residual stream, and what the norm that follows needs: sums of squares; scaled, where adaptive."""
    cell = row[:, None] * WIDTH + column[None, :]
    y = y.to(x.dtype.element_ty)
    tl.store(x + cell, y, mask=live[:, None])
    y = y.to(tl.float32)
    tl.store(squares + tile * CAPACITY + row, tl.sum(y * y, axis=1), mask=live)
    if ADAPTIVE:
        y *= tl.load(scales + entry[:, None] * tables + column[None, :])
        tl.store(scaled + cell, y.to(scaled.dtype.element_ty), mask=live[:, None])


@triton.jit
def _angles(rope, row, live, within, DIM: tl.constexpr, N: tl.constexpr):
    """Cosines and sines for N columns from `within` a head on, pairs side by side, f32 [rows, N / 2] each."""
    at = rope + row[:, None] * DIM + within + 2 * tl.arange(0, N // 2)[None, :]
    return tl.load(at, mask=live[:, None], other=0.0), tl.load(at + 1, mask=live[:, None], other=0.0)


@triton.jit
def _place(
    y, cosine, sine, q, keys, values, row, live, first, at, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Columns `first`... of [q | k | v], N of them in one head, with RoPE, to `q` or to rows at + row of the cache."""
    head, column = first // DIM, first % DIM + tl.arange(0, N)
    if head < HEADS + KV:  # a pair is a complex number
        re, im = tl.split(tl.reshape(y, (M, N // 2, 2)))
        y = tl.reshape(tl.join(re * cosine - im * sine, re * sine + im * cosine), (M, N))
    if head < HEADS:
        cell = row[:, None] * (HEADS * DIM) + head * DIM + column[None, :]
        tl.store(q + cell, y.to(q.dtype.element_ty), mask=live[:, None])
    else:
        cell = (at + row)[:, None] * DIM + column[None, :]
        if head < HEADS + KV:
            tl.store(keys + (head - HEADS) * capacity * DIM + cell, y.to(keys.dtype.element_ty), mask=live[:, None])
        else:
            cell += (head - HEADS - KV) * capacity * DIM
            tl.store(values + cell, y.to(values.dtype.element_ty), mask=live[:, None])


@triton.jit
def _gelu(x):
    """The tanh form: 0.5 (1 + tanh(y)) is sigmoid(2 y)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _is_last(arrived, splits: tl.constexpr):
    """Whether this program is the last of `splits` to get here; what the others wrote before is then visible."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _wait(PDL: tl.constexpr):
    """Programmatic dependent launch: this kernel may have been started early; wait for what the one before wrote."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _release(PDL: tl.constexpr):
    """The next kernel may start; it waits for this one's results by itself."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "at", "capacity"])
def _project(
    x, squares, w, biases, when, rope, q, keys, values, rows, at, capacity,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ADAPTIVE: tl.constexpr,
    CAPACITY: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * N
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = first + tl.arange(0, N)
    live = row < rows
    cosine, sine = _angles(rope, row, live, first % DIM, DIM, N)
    _wait(PDL)
    sums = _sums(squares, row, live, CAPACITY, TILES)
    y = _product(x, w, row, live, column, 0, WIDTH, WIDTH, M, N, BK)
    _release(PDL)
    y *= _factor(sums, WIDTH)
    if ADAPTIVE:
        entry = tl.load(when + row, mask=live, other=0)
        y += tl.load(biases + entry[:, None] * ((HEADS + 2 * KV) * DIM) + column[None, :])
    _place(y, cosine, sine, q, keys, values, row, live, first, at, capacity, HEADS, KV, DIM, M, N)


@triton.jit(do_not_specialize=["rows", "count", "capacity", "state_rows", "state_keys"])
def _attention(
    q, keys, values, seen, out, partial, weight, rows, count, capacity, state_rows, state_keys,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV
    block, split, kv = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _wait(PDL)
    query = block * M + tl.arange(0, M)  # a token's heads that share keys are rows side by side
    token = query // GROUP
    live = token < rows
    dim = tl.arange(0, DIM)
    cell = (token * HEADS + kv * GROUP + query % GROUP)[:, None] * DIM + dim[None, :]
    asked = tl.load(q + cell, mask=live[:, None], other=0.0)
    limit = tl.where(token < state_rows, state_keys, count)  # the state token sees no actions
    keys += kv * capacity * DIM
    values += kv * capacity * DIM
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, DIM), tl.float32)
    for begin in range(split * SPAN, tl.minimum(split * SPAN + SPAN, count), N):
        key = begin + tl.arange(0, N)
        inside = key < count
        visible = tl.load(seen + key, mask=inside, other=0) != 0
        k = tl.load(keys + key[None, :] * DIM + dim[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(values + key[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(asked, k, input_precision="tf32x3")
        score = tl.where(visible[None, :] & (key[None, :] < limit[:, None]), score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        p = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, axis=1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * fade[:, None], input_precision="tf32x3")
        top = higher
    _release(PDL)
    if SPLITS == 1:
        tl.store(out + cell, (mixed / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
    else:
        lane = ((kv * tl.num_programs(0) + block) * SPLITS) * M + tl.arange(0, M)
        mine = lane + split * M
        mixed /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(partial + mine[:, None] * DIM + dim[None, :], mixed.to(partial.dtype.element_ty))
        tl.store(weight + 2 * mine, top)
        tl.store(weight + 2 * mine + 1, total)


@triton.jit(do_not_specialize=["rows"])
def _merge(
    partial, weight, out, rows, blocks,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV
    kv = tl.program_id(1)
    _wait(PDL)
    query = tl.program_id(0) * M + tl.arange(0, M)
    token = query // GROUP
    live = token < rows
    lane = (kv * blocks + query // LANES) * SPLITS * LANES + query % LANES
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    there = (split < SPLITS)[:, None] & live[None, :]
    at = lane[None, :] + split[:, None] * LANES
    tops = tl.load(weight + 2 * at, mask=there, other=float("-inf"))
    share = tl.exp(tops - tl.max(tops, axis=0)[None, :]) * tl.load(weight + 2 * at + 1, mask=there, other=0.0)
    share /= tl.sum(share, axis=0)[None, :]
    dim = tl.arange(0, DIM)
    mixed = tl.zeros((M, DIM), tl.float32)
    for s in tl.static_range(SPLITS):
        part = tl.load(partial + (lane + s * LANES)[:, None] * DIM + dim[None, :], mask=live[:, None], other=0.0)
        mixed += tl.sum(tl.where(split[:, None] == s, share, 0.0), axis=0)[:, None] * part.to(tl.float32)
    _release(PDL)
    cell = (token * HEADS + kv * GROUP + query % GROUP)[:, None] * DIM + dim[None, :]
    tl.store(out + cell, mixed.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["rows"])
def _geglu(
    x, squares, w, biases, when, out, rows,
    WIDTH: tl.constexpr, MLP: tl.constexpr, ADAPTIVE: tl.constexpr, CAPACITY: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    live = row < rows
    _wait(PDL)
    sums = _sums(squares, row, live, CAPACITY, TILES)
    k = tl.arange(0, BK)
    a_at = x + row[:, None] * WIDTH + k[None, :]
    w_at = w + column[None, :] * WIDTH + k[:, None]
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    for at in range(0, WIDTH, BK):
        a = tl.load(a_at + at, mask=live[:, None], other=0.0)
        gate = tl.dot(a, tl.load(w_at + at), gate, input_precision="tf32x3")
        up = tl.dot(a, tl.load(w_at + MLP * WIDTH + at), up, input_precision="tf32x3")
    _release(PDL)
    factor = _factor(sums, WIDTH)
    gate *= factor
    up *= factor
    if ADAPTIVE:
        entry = tl.load(when + row, mask=live, other=0)
        bias = biases + entry[:, None] * (2 * MLP) + column[None, :]
        gate += tl.load(bias)
        up += tl.load(bias + MLP)
    h = _gelu(gate) * up
    tl.store(out + row[:, None] * MLP + column[None, :], h.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["rows"])
def _add_product(
    a, w, x, scaled, gates, scales, when, squares, partial, arrived, rows, tables,
    K: tl.constexpr, WIDTH: tl.constexpr, ADAPTIVE: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block, split, rows_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = rows_block * M + tl.arange(0, M)
    column = block * N + tl.arange(0, N)
    live = row < rows
    SPAN: tl.constexpr = K // SPLITS
    _wait(PDL)
    y = _product(a, w, row, live, column, split * SPAN, SPAN, K, M, N, BK)
    _release(PDL)
    cell = row[:, None] * WIDTH + column[None, :]
    last = True
    if SPLITS > 1:
        tl.store(partial + split * rows * WIDTH + cell, y, mask=live[:, None])
        last = _is_last(arrived + rows_block * tl.num_programs(0) + block, SPLITS)
        if last:
            y = tl.zeros((M, N), tl.float32)
            for s in tl.static_range(SPLITS):
                y += tl.load(partial + s * rows * WIDTH + cell, mask=live[:, None], other=0.0, cache_modifier=".cg")
    if last:
        entry = row * 0
        if ADAPTIVE:
            entry = tl.load(when + row, mask=live, other=0)
            y *= tl.load(gates + entry[:, None] * tables + column[None, :])
        y += tl.load(x + cell, mask=live[:, None], other=0.0)
        _put(y, x, scaled, scales, entry, tables, squares, row, live, column, block, WIDTH, ADAPTIVE, CAPACITY)


@triton.jit(do_not_specialize=["rows"])
def _lift(
    actions, w, biases, when, out, rows,
    ACTION: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    live = row < rows
    _wait(PDL)
    _release(PDL)
    h = _linear_in(actions, w, biases, when, row, live, column, ACTION, PADDED, WIDTH)
    tl.store(out + row[:, None] * WIDTH + column[None, :], h * tl.sigmoid(h), mask=live[:, None])


@triton.jit
def _linear_in(
    actions, w, biases, when, row, live, column,
    ACTION: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Actions (noisy) times w [WIDTH, ACTION], with the bias of each row's time."""
    a = tl.arange(0, PADDED)
    real = a < ACTION
    action = tl.load(actions + row[:, None] * ACTION + a[None, :], mask=live[:, None] & real[None, :], other=0.0)
    part = tl.load(w + column[None, :] * ACTION + a[:, None], mask=real[:, None], other=0.0)
    entry = tl.load(when + row, mask=live, other=0)
    bias = tl.load(biases + entry[:, None] * WIDTH + column[None, :])
    return tl.dot(action, part, bias, input_precision="tf32x3")


@triton.jit(do_not_specialize=["rows"])
def _embed(
    actions, w_in, biases, when, h, w_out, b_out, state, w_state, b_state, x, scaled, scales, squares, rows, tables,
    ACTION: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ADAPTIVE: tl.constexpr, CAPACITY: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * M + tl.arange(0, M)
    block = tl.program_id(0)
    column = block * N + tl.arange(0, N)
    live = row < rows
    _wait(PDL)
    entry = row * 0
    if ADAPTIVE:
        y = _linear_in(actions, w_in, biases, when, row, live, column, ACTION, PADDED, WIDTH)
        entry = tl.load(when + row, mask=live, other=0)
    else:
        # one pass of tf32 has three bits more than the bfloat16 that the sum is rounded to
        y = _product(h, w_out, row, live, column, 0, WIDTH, WIDTH, M, N, BK, False)
        y += tl.load(b_out + column)[None, :]
        a = tl.arange(0, PADDED)
        real = a < ACTION
        w = tl.load(w_state + column[:, None] * ACTION + a[None, :], mask=real[None, :], other=0.0)
        token = tl.sum(w * tl.load(state + a, mask=real, other=0.0)[None, :], axis=1) + tl.load(b_state + column)
        token = token.to(x.dtype.element_ty)
        tl.store(x - WIDTH + column, token)  # the row before the actions'
        token = token.to(tl.float32)
        tl.store(squares - 1 + block * CAPACITY, tl.sum(token * token, axis=0))
    _release(PDL)
    _put(y, x, scaled, scales, entry, tables, squares, row, live, column, block, WIDTH, ADAPTIVE, CAPACITY)


@triton.jit(do_not_specialize=["rows"])
def _move(
    x, squares, w, biases, when, free, actions, rows, dt,
    ACTION: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    a = tl.arange(0, PADDED)
    live, real = row < rows, a < ACTION
    _wait(PDL)
    sums = _sums(squares, row, live, CAPACITY, TILES)
    k = tl.arange(0, BK)
    v = tl.zeros((M, PADDED), tl.float32)
    for at in range(0, WIDTH, BK):
        token = tl.load(x + row[:, None] * WIDTH + at + k[None, :], mask=live[:, None], other=0.0)
        part = tl.load(w + a[None, :] * WIDTH + at + k[:, None], mask=real[None, :], other=0.0)
        v = tl.dot(token.to(tl.float32), part, v, input_precision="tf32x3")
    _release(PDL)
    v *= _factor(sums, WIDTH)
    entry = tl.load(when + row, mask=live, other=0)
    v += tl.load(biases + entry[:, None] * ACTION + a[None, :], mask=real[None, :], other=0.0)
    cell = actions + row[:, None] * ACTION + a[None, :]
    inside = live[:, None] & real[None, :]
    v *= tl.load(free + row, mask=live, other=0.0)[:, None]
    tl.store(cell, tl.load(cell, mask=inside, other=0.0) - dt * v, mask=inside)
