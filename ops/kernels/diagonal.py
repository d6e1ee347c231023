"""Triton kernel of `linear_attn` with a decay a channel of k, of v, or of both.

Inside a chunk, b the running sum of the log decays, q e^b meets k e^-b on the tensor cores. That
holds while no sum falls below -LIMIT; a chunk with a stronger decay is taken 16 rows at a time, and
16 rows too strong for it column by column, with no exponent above zero. So no decay overflows, and
no exponent is a difference of rounded large numbers: a strong decay does not blur the weak ones
after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flacompile.ops.kernels.tiles import (
    _dot,
    _load,
    _load_row,
    _load_state,
    _owned,
    _rows,
    _sequence,
    _store_end,
    _store_rows,
)

ROWS = tl.constexpr(16)  # of a part of a chunk that decays too fast to be taken whole


@triton.jit
def _decays(scalar, diagonal, at, by, inside, col, WIDTH: tl.constexpr):
    """Log decays of rows for every channel: the diagonal one plus the scalar one, if any."""
    g = _load(diagonal, at, by, inside, col, WIDTH)
    if scalar is not None:
        g += tl.load(scalar + at + by, mask=inside, other=0.0)[:, None]
    return g


@triton.jit
def _decay_row(scalar, diagonal, at, inside, col, WIDTH: tl.constexpr):
    """``_decays`` of one row."""
    g = _load_row(diagonal, at, inside, col, WIDTH)
    if scalar is not None:
        g += tl.load(scalar + at, mask=inside, other=0.0)
    return g


@triton.jit
def _lowest(gk_c, gv_c, GK: tl.constexpr, GV: tl.constexpr):
    """The least sum of log decays over the rows, of any channel."""
    lowest = 0.0
    if GK:
        lowest = tl.minimum(lowest, tl.min(tl.sum(gk_c, 0), 0))
    if GV:
        lowest = tl.minimum(lowest, tl.min(tl.sum(gv_c, 0), 0))
    return lowest


@triton.jit
def _chunk(
    q, k, v, g, gk, gv, at, by, later, inside, g_inside, kk, vv, K: tl.constexpr, V: tl.constexpr
):
    """Rows of q, k, v and their decays; what is absent is k or v, and never used."""
    k_c, v_c = _load(k, at, by, inside, kk, K), _load(v, at, by, inside, vv, V)
    q_c, gk_c, gv_c = k_c, k_c, v_c
    if q is not None:
        q_c = _load(q, at, by, inside, kk, K)
    if gk is not None:
        gk_c = _decays(g, gk, at + later, by, g_inside, kk, K)
    if gv is not None:  # the scalar decay is added to gk where there is one
        gv_c = _decays(g if gk is None else None, gv, at + later, by, g_inside, vv, V)
    return q_c, k_c, v_c, gk_c, gv_c


@triton.jit
def _factored(
    q_c, k_c, v_c, gk_c, gv_c, S, i, DOT: tl.constexpr, PRECISION: tl.constexpr,
    READ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr,
):  # fmt: skip
    """o and the next S of rows whose decays, all of them together, are mild."""
    k_in, v_in, k_end, v_end, q_in = k_c, v_c, k_c, v_c, q_c
    if GK:
        b, b_end = tl.cumsum(gk_c, 0), tl.sum(gk_c, 0)
        k_in = k_c.to(tl.float32) * tl.exp(-b)
        k_end = k_c.to(tl.float32) * tl.exp(b_end[None, :] - b)
        q_in = q_c.to(tl.float32) * tl.exp(b)
    if GV:
        c, c_end = tl.cumsum(gv_c, 0), tl.sum(gv_c, 0)
        v_in = v_c.to(tl.float32) * tl.exp(-c)
        v_end = v_c.to(tl.float32) * tl.exp(c_end[None, :] - c)
    o_c = v_c.to(tl.float32)
    if READ:
        A = _dot(q_in, tl.trans(k_in), DOT, PRECISION)
        A = tl.where(i[:, None] >= i[None, :], A, 0.0)
        o_c = _dot(q_in, S, DOT, PRECISION) + _dot(A, v_in, DOT, PRECISION)
        if GV:
            o_c *= tl.exp(c)
    if GK:
        S *= tl.exp(b_end)[:, None]
    if GV:
        S *= tl.exp(c_end)[None, :]
    return o_c, S + _dot(tl.trans(k_end), v_end, DOT, PRECISION)


@triton.jit
def _by_columns(
    q_c, k, k_c, v, v_c, g, gk, gv, S, first, start, length, h, H, i, kk, vv,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and the next S of ROWS rows with any decay.

    The decay between rows i and j stands inside the dot product. Taking the columns j from the last
    to the first, it is a running sum, `before`, which ends as the decay from the rows' start;
    `after` is its mirror image, the decay from a row to the end.
    """
    lower = i[:, None] >= i[None, :]
    q_c, k_c, v_c = q_c.to(tl.float32), k_c.to(tl.float32), v_c.to(tl.float32)
    o_c = tl.zeros([ROWS, BV], tl.float32)
    if gk is None:
        A = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
    else:
        A = tl.zeros([ROWS, ROWS], tl.float32)
        before_k = tl.zeros([ROWS, BK], tl.float32)
        after_k = tl.zeros([ROWS, BK], tl.float32)
        end_k = tl.zeros([BK], tl.float32)
    if gv is not None:
        before_v = tl.zeros([ROWS, BV], tl.float32)
        after_v = tl.zeros([ROWS, BV], tl.float32)
        end_v = tl.zeros([BV], tl.float32)
    for step in range(ROWS):
        j = ROWS - 1 - step
        at, _by, later, in_j, g_in_j = _rows(first + j, 0, start, length, h, H, REVERSE)
        if gk is not None:
            k_j = _load_row(k, at, in_j, kk, K)
            A_j = tl.sum(q_c * tl.exp(before_k) * k_j[None, :], 1)
            g_j = _decay_row(g, gk, at + later, g_in_j, kk, K)
            before_k += tl.where((i >= j)[:, None], g_j[None, :], 0.0)
            after_k += tl.where((i < j)[:, None], g_j[None, :], 0.0)
            end_k += g_j
        else:
            A_j = tl.sum(tl.where(i[None, :] == j, A, 0.0), 1)
        if gv is None:
            A = tl.where(i[None, :] == j, A_j[:, None], A)
        else:
            v_j = _load_row(v, at, in_j, vv, V)
            A_j = tl.where(i >= j, A_j, 0.0)
            o_c += A_j[:, None] * tl.exp(before_v) * v_j[None, :]
            # The scalar decay was added to gk where there is one.
            g_v = _decay_row(g if gk is None else None, gv, at + later, g_in_j, vv, V)
            before_v += tl.where((i >= j)[:, None], g_v[None, :], 0.0)
            after_v += tl.where((i < j)[:, None], g_v[None, :], 0.0)
            end_v += g_v
    if gk is not None:
        q_c *= tl.exp(before_k)
        k_c *= tl.exp(after_k)
    from_state = _dot(q_c, S, DOT, PRECISION)
    if gv is None:
        o_c = from_state + _dot(tl.where(lower, A, 0.0), v_c, DOT, PRECISION)
    else:
        o_c += from_state * tl.exp(before_v)
        v_c *= tl.exp(after_v)
        S *= tl.exp(end_v)[None, :]
    if gk is not None:
        S *= tl.exp(end_k)[:, None]
    return o_c, S + _dot(tl.trans(k_c), v_c, DOT, PRECISION)


@triton.jit
def _in_parts(
    q, k, v, g, gk, gv, o, S, scale, chunk, start, length, h, H, kk, vv,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A chunk of C rows, ROWS at a time; the next S."""
    GK: tl.constexpr = gk is not None
    GV: tl.constexpr = gv is not None
    READ: tl.constexpr = o is not None
    i = tl.arange(0, ROWS)
    for first in range(chunk, chunk + C, ROWS):
        at, by, later, inside, g_inside = _rows(first, i, start, length, h, H, REVERSE)
        q_c, k_c, v_c, gk_c, gv_c = _chunk(
            q, k, v, g, gk, gv, at, by, later, inside, g_inside, kk, vv, K, V
        )
        if _lowest(gk_c, gv_c, GK, GV) > -LIMIT:
            o_c, S = _factored(q_c, k_c, v_c, gk_c, gv_c, S, i, DOT, PRECISION, READ, GK, GV)
        else:
            o_c, S = _by_columns(
                q_c, k, k_c, v, v_c, g, gk, gv, S, first, start, length, h, H, i, kk, vv,
                K, V, BK, BV, REVERSE, DOT, PRECISION,
            )  # fmt: skip
        if READ:
            _store_rows(scale * o_c, o, at, by, inside, vv, V)
    return S


@triton.jit
def _diagonal_kernel(
    q, k, v, g, gk, gv, state, cu_seqlens, o, ends, final_state, total_k, total_v, scale, T, H,
    SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A decay a channel of k, of v, or of both; a scalar one, g, is added to one of them."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    if ends is not None and SEGMENTS == 1:
        return  # as above
    GK: tl.constexpr = gk is not None
    GV: tl.constexpr = gv is not None
    READ: tl.constexpr = o is not None
    n, segment, h, block, state_index = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, state_index, kk, vv, K, V)
    sum_k, sum_v = tl.zeros([BK], tl.float32), tl.zeros([BV], tl.float32)

    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        # 2. Load the chunk.
        at, by, later, inside, g_inside = _rows(first, i, start, length, h, H, REVERSE)
        q_c, k_c, v_c, gk_c, gv_c = _chunk(
            q, k, v, g, gk, gv, at, by, later, inside, g_inside, kk, vv, K, V
        )
        if gk is not None:
            sum_k += tl.sum(gk_c, 0)
        if gv is not None:
            sum_v += tl.sum(gv_c, 0)

        # 3. All rows at once where the decays allow it.
        if _lowest(gk_c, gv_c, GK, GV) > -LIMIT:
            o_c, S = _factored(q_c, k_c, v_c, gk_c, gv_c, S, i, DOT, PRECISION, READ, GK, GV)
            if READ:
                _store_rows(scale * o_c, o, at, by, inside, vv, V)
        else:
            S = _in_parts(
                q, k, v, g, gk, gv, o, S, scale, first, start, length, h, H, kk, vv,
                K, V, BK, BV, C, REVERSE, DOT, PRECISION, LIMIT,
            )  # fmt: skip

    _store_end(S, ends, final_state, n, segment, SEGMENTS, h, H, kk, vv, K, V)
    if total_k is not None:
        tl.store(total_k + state_index * K + kk, sum_k, mask=kk < K)
    if total_v is not None:
        tl.store(total_v + state_index * V + vv, sum_v, mask=vv < V)
