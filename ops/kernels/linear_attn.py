"""Triton kernels of `linear_attn`: one pass over time with the state in registers.

S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T,   o_t = scale * q_t S_t

Grid: one program a (sequence, segment, head, block of BV value channels), the value blocks of a
head next to each other so that they share q and k in cache. A program walks its rows in chunks of C
and holds its [BK, BV] tile of the state in fp32, so that every byte is moved once. Row p of a
sequence is token p, or with REVERSE token (length - 1 - p) with the decay of the token after it:
the same program then runs time backwards, which makes the backward three calls of it.

Few sequences and heads do not fill a GPU: there a sequence is cut into segments. A first pass finds
what each adds to the state, ``_join_kernel`` turns that into the state before each, and all of them
run at once.

Inside a chunk, b the running sum of the log decays, q e^b meets k e^-b on the tensor cores. That
holds while no sum falls below -LIMIT; a chunk with a stronger decay is taken 16 rows at a time, and
16 rows too strong for it column by column, with no exponent above zero. So no decay overflows, and
no exponent is a difference of rounded large numbers: a strong decay does not blur the weak ones
after it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch

DOTS = {
    "bf16": {"DOT": tl.bfloat16, "PRECISION": "tf32"},
    "tf32": {"DOT": tl.float32, "PRECISION": "tf32"},
    "ieee": {"DOT": tl.float32, "PRECISION": "ieee"},
}
LIMITS = {"bf16": 60.0, "tf32": 60.0, "ieee": 16.0}  # e^60 is far from the largest bf16, e^88
PROGRAMS = 264  # fill the largest GPUs, two on each multiprocessor
SHORTEST = 512  # rows of a segment; in a shorter one a second read of k and v does not pay
ROWS = tl.constexpr(16)  # of a part of a chunk that decays too fast to be taken whole


@triton.jit
def _sequence(cu_seqlens, n, T):
    """First token and number of tokens of sequence n."""
    if cu_seqlens is None:
        start = n.to(tl.int64) * T
        length = start * 0 + T
    else:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    return start, length


@triton.jit
def _rows(first, i, start, length, h, H, REVERSE: tl.constexpr):
    """Rows first + i of the sequence, as indices in [B * T * H]: at + by, and at + by + later.

    The second is where the decay of a row stands. Offsets by are small, so that only the scalar at
    needs 64 bits. Also which of the rows are there, and which have a decay.
    """
    inside = first + i < length
    if REVERSE:
        return (start + length - 1 - first) * H + h, -i * H, H, inside, inside & (first + i > 0)
    else:
        return (start + first) * H + h, i * H, H * 0, inside, inside


@triton.jit
def _load(pointer, at, by, inside, col, WIDTH: tl.constexpr):
    """Rows of a [*, WIDTH] tensor, zero outside."""
    mask = inside[:, None] & (col < WIDTH)[None, :]
    offsets = by[:, None] * WIDTH + col[None, :]
    return tl.load(pointer + at * WIDTH + offsets, mask=mask, other=0.0)


@triton.jit
def _load_row(pointer, at, inside, col, WIDTH: tl.constexpr):
    """One row in fp32, zero outside."""
    mask = inside & (col < WIDTH)
    return tl.load(pointer + at * WIDTH + col, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dot(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x y with fp32 sums, the factors in DOT."""
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


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
def _decay_sums(g, at, by, inside):
    """Running sums of the log decays of a chunk, each row's own, and the sums of all: hi and lo.

    g = hi + lo with hi a multiple of 2^-10: sums of up to 128 hi are exact, so a difference of sums
    is as good as the sum between. e^-128 is 0 in fp32 already.
    """
    g_c = tl.load(g + at + by, mask=inside, other=0.0)
    g_c = tl.where(g_c < -128.0, -128.0, g_c)
    hi = tl.floor(g_c * 1024.0) * (1.0 / 1024.0)
    lo = g_c - hi
    return tl.cumsum(hi, 0), tl.cumsum(lo, 0), hi, lo, tl.sum(hi, 0), tl.sum(lo, 0)


@triton.jit
def _load_state(state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    offsets = sequence_head * K * V + kk[:, None] * V + vv[None, :]
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    return tl.load(state + offsets, mask=mask, other=0.0)


@triton.jit
def _store_state(S, state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    offsets = sequence_head * K * V + kk[:, None] * V + vv[None, :]
    tl.store(state + offsets, S, mask=(kk < K)[:, None] & (vv < V)[None, :])


@triton.jit
def _store_rows(o_c, o, at, by, inside, vv, V: tl.constexpr):
    mask = inside[:, None] & (vv < V)[None, :]
    offsets = by[:, None] * V + vv[None, :]
    tl.store(o + at * V + offsets, o_c.to(o.dtype.element_ty), mask=mask)


@triton.jit
def _owned(SEGMENTS, H, NV: tl.constexpr):
    """Sequence, segment, head and value block of this program, and the place of its state."""
    state_index = (tl.program_id(0) // NV).to(tl.int64)
    h = state_index % H
    segment = (state_index // H) % SEGMENTS
    n = state_index // H // SEGMENTS
    return n, segment, h, tl.program_id(0) % NV, state_index


@triton.jit
def _store_end(
    S, ends, final_state, n, segment, SEGMENTS, h, H, kk, vv, K: tl.constexpr, V: tl.constexpr
):
    """The state after a segment, to ends in a first pass, or after the last one to final_state."""
    if ends is not None:
        _store_state(S, ends, (n * SEGMENTS + segment) * H + h, kk, vv, K, V)
    elif segment == SEGMENTS - 1:
        _store_state(S, final_state, n * H + h, kk, vv, K, V)


@triton.jit
def _scalar_kernel(
    q, k, v, g, state, cu_seqlens, o, ends, final_state, total, scale, T, H, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """No decay (g None) or one decay a token and head: it factors out of every dot product.

    Without q and o only the state is found; total takes the segment's log decay.
    """
    # 1. What this program owns.
    if ends is not None and SEGMENTS == 1:
        return  # a first pass over the only segment: nobody reads it
    n, segment, h, block, state_index = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, state_index, kk, vv, K, V)
    sum_g = 0.0

    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        # 2. Load the chunk.
        at, by, later, inside, g_inside = _rows(first, i, start, length, h, H, REVERSE)
        k_c = _load(k, at, by, inside, kk, K)
        v_c = _load(v, at, by, inside, vv, V)
        if g is not None:
            hi, lo, _, _, hi_end, lo_end = _decay_sums(g, at + later, by, g_inside)
            sum_g += hi_end + lo_end

        if o is not None:
            # 3. Scores inside the chunk, and the read of the state before it; both decayed.
            q_c = _load(q, at, by, inside, kk, K)
            A = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
            o_c = _dot(q_c, S, DOT, PRECISION)
            lower = i[:, None] >= i[None, :]
            if g is None:
                A = tl.where(lower, A, 0.0)
            else:
                between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
                A = tl.where(lower, A * tl.exp(tl.where(lower, between, 0.0)), 0.0)
                o_c *= tl.exp(hi + lo)[:, None]
            o_c += _dot(A, v_c, DOT, PRECISION)
            _store_rows(scale * o_c, o, at, by, inside, vv, V)

        # 4. Take the chunk into the state.
        if g is not None:
            S *= tl.exp(hi_end + lo_end)
            v_c = v_c.to(tl.float32) * tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
        S += _dot(tl.trans(k_c), v_c, DOT, PRECISION)

    _store_end(S, ends, final_state, n, segment, SEGMENTS, h, H, kk, vv, K, V)
    if total is not None:
        tl.store(total + state_index, sum_g)


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


@triton.jit
def _join_kernel(
    ends, total, total_k, total_v, state, H, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What each segment adds becomes the state before it, in place.

    Grid: one program a (sequence, head, block of BK key channels).
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    sequence_head = (tl.program_id(0) // NK).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    kk, vv = (tl.program_id(0) % NK) * BK + tl.arange(0, BK), tl.arange(0, BV)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, sequence_head, kk, vv, K, V)
    for segment in range(SEGMENTS):
        index = (n * SEGMENTS + segment) * H + h
        added = _load_state(ends, index, kk, vv, K, V)
        _store_state(S, ends, index, kk, vv, K, V)
        if total is not None:
            S *= tl.exp(tl.load(total + index))
        if total_k is not None:
            S *= tl.exp(tl.load(total_k + index * K + kk, mask=kk < K, other=0.0))[:, None]
        if total_v is not None:
            S *= tl.exp(tl.load(total_v + index * V + vv, mask=vv < V, other=0.0))[None, :]
        S += added


def tiles(K: int, V: int, diagonals: int, dot: str) -> dict[str, int]:
    """Block sizes and warps, so that a thread's registers hold its share of the work.

    Chosen from times on an H200 and from the register and spill counts of binaries for sm_80 and
    sm_90, which tests/compile_kernels.py prints. Exact fp32 dots run without tensor cores and keep
    their operands in registers too, hence the smaller tiles; there a K above 128 still spills. The
    loads of diagonal decays stand beside a branch, where Triton 3.6's pipeline gives wrong values.

    Args:
        diagonals: how many of gk and gv are diagonal.
        dot: what the factors of a dot are, "bf16", "tf32" or "ieee".
    """
    BK = max(16, triton.next_power_of_2(K))
    if dot == "ieee":
        BV, C = 32 if BK <= 64 else 16, 16
    else:
        BV, C = 64 if BK <= 128 else 32, 64 if BK <= 128 and diagonals < 2 else 32
        C = min(C, 32) if dot == "tf32" else C
    BV = min(BV, max(16, triton.next_power_of_2(V)))
    warps = 4 if (64 if dot == "ieee" else 128) >= BK else 8
    stages = 1 if diagonals or dot == "ieee" else 2
    return {"BK": BK, "BV": BV, "C": C, "num_warps": warps, "num_stages": stages}


def dot_of(*dtypes: torch.dtype) -> str:
    """What the factors of dots of such tensors are: a name of DOTS."""
    if torch.float32 in dtypes:
        return "ieee"
    return "bf16" if set(dtypes) == {torch.bfloat16} else "tf32"


def num_segments(programs: Any, time: Any) -> Any:
    """Into how many segments a sequence is cut, where ``programs`` walk one each without."""
    most = PROGRAMS // torch.sym_max(programs, 1)
    return torch.sym_max(1, torch.sym_min(most, time // SHORTEST))


def linear_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    *,
    out_dtype: torch.dtype | None = None,
    dot: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel the decays call for.

    Args:
        q, k: [B, T, H, K], k and v in q's or any other float dtype.
        v: [B, T, H, V].
        gk: fp32 natural-log decay, [B, T, H] or [B, T, H, K].
        gv: fp32 natural-log decay, [B, T, H] or [B, T, H, V].
        state: [N, H, K, V] fp32; default zero.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        scale: factor of the output.
        reverse: run time backwards inside each sequence, position t with the decay of t + 1.
        out_dtype: dtype of o; default v's.
        dot: what the factors of a dot are; default by the dtypes of q, k and v.

    Returns:
        o [B, T, H, V] and the state after the last row taken [N, H, K, V] fp32.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scalars = [g for g in (gk, gv) if g is not None and g.ndim == 3]
    g = sum(scalars[1:], scalars[0]).contiguous() if scalars else None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gk, gv = (None if d is None or d.ndim == 3 else d.contiguous() for d in (gk, gv))
    state = None if state is None else state.contiguous()
    o = torch.empty_like(v, dtype=out_dtype)
    final_state = torch.empty(N, H, K, V, dtype=torch.float32, device=v.device)

    diagonals = (gk is not None) + (gv is not None)
    dot = dot_of(q.dtype, k.dtype, v.dtype) if dot is None else dot
    meta = {"K": K, "V": V, "REVERSE": reverse, **tiles(K, V, diagonals, dot), **DOTS[dot]}
    meta |= {"LIMIT": LIMITS[dot]} if diagonals else {}
    kernel, decays = (_diagonal_kernel, (g, gk, gv)) if diagonals else (_scalar_kernel, (g,))
    programs = N * H * triton.cdiv(V, meta["BV"])
    segments = num_segments(programs, T)
    length = -(-T // (segments * meta["C"])) * meta["C"]

    def run(q: Any, state: Any, o: Any, ends: Any, totals: tuple[Any, ...]) -> None:
        launch(
            kernel, (programs * segments,), q, k, v, *decays, state, cu_seqlens, o, ends,
            final_state, *totals, scale, T, H, length, segments, **meta,
        )  # fmt: skip

    nothing = (None,) * (2 if diagonals else 1)
    if isinstance(segments, int) and segments == 1:
        run(q, state, o, None, nothing)
        return o, final_state
    ends = final_state.new_empty(N, segments, H, K, V)
    shapes = ((gk, K), (gv, V)) if diagonals else ((g, None),)
    totals = tuple(
        x if x is None else ends.new_empty(N, segments, H, *([width] if width else []))
        for x, width in shapes
    )
    run(None, None, None, ends, totals)
    BK = min(16, meta["BK"])
    total = totals if not diagonals else (None, *totals)
    launch(
        _join_kernel, (N * H * triton.cdiv(K, BK),), ends, *(*total, None, None)[:3], state, H,
        segments, K=K, V=V, BK=BK, BV=max(16, triton.next_power_of_2(V)), num_warps=4,
    )  # fmt: skip
    run(q, ends, o, None, nothing)
    return o, final_state
